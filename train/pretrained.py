"""Trained weights by path, whoever wrote them: a run, one of its checkpoints, or a Hugging Face directory."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from conf.schema import to_jsonable
from model.config import EXECUTION_KEYS, ModelConfig
from model.huggingface import open_huggingface, write_huggingface
from model.problems import BadInput
from model.weights import StoredWeights, Weights, entries, shards, streamed_logits, write_safetensors
from train.checkpoint import manifest
from train.checkpoint.folder import below
from train.checkpoint.manifest import Damaged, Manifest
from train.data import tokenizer as tokenizers_
from train.files import sync

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True)
class Source:
    """Weights, and what is known of them.

    Attributes:
        path: of the folder that holds them.
        weights: read one tensor at a time.
        tokenizer: the tokenizer.json beside them, if there is one.
        run: the manifest of a checkpoint of ours; None for a Hugging Face directory.
    """

    path: Path
    weights: StoredWeights
    tokenizer: Path | None
    run: Manifest | None


def open_source(path: Path, *, checked: bool = True) -> Source:
    """Open the weights at a path; of a run, those of its newest sound checkpoint.

    Args:
        path: of a run, a checkpoint or a Hugging Face directory.
        checked: compare every file of ours with its checksum; another process may have.

    Raises:
        BadInput: nothing is there, or it is damaged, or not Llama-shaped; by file and tensor.
    """
    path = path.expanduser().absolute()
    if (path / "config.json").exists() and not (path / manifest.MANIFEST).exists():
        try:
            weights = open_huggingface(path)
        except ValueError as error:
            raise BadInput(str(error).splitlines()) from None
        tokenizer = path / TOKENIZER if (path / TOKENIZER).exists() else None
        if tokenizer:
            _check_tokenizer(tokenizer, weights.config)
        return Source(path, weights, tokenizer, None)
    reasons = []
    found = [path] if (path / manifest.MANIFEST).exists() else below(path)
    for candidate in found:
        try:
            run = manifest.read(candidate)
            if checked:
                manifest.check_files(candidate, run)
        except Damaged as damage:
            reasons.append(f"{candidate}: {damage}")
            continue
        stored = {name: entry for name, entry in run.tensors.items() if "/" not in name}
        return Source(candidate, StoredWeights(_shape(run), candidate, stored), candidate / TOKENIZER, run)
    works = "a run folder, one of its checkpoints/step-…, or a Hugging Face directory with config.json would work"
    raise BadInput(reasons or [f"{path}: no weights are there; {works}"])


def write_checkpoint(weights: Weights, source: Source, folder: Path, max_shard_bytes: int) -> None:
    """Write weights alone, without an optimizer's state, as a checkpoint of ours: for `init_from`.

    Args:
        weights: to write, of one tensor at a time, in fp32.
        source: what they were made from: its recipe and tokenizer go along.
        folder: exists.
        max_shard_bytes: of one file.
    """
    tensors: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for number, shard in enumerate(shards(entries(weights, torch.float32), max_shard_bytes)):
        file = f"weights{number:05d}.safetensors"
        files[file] = write_safetensors(folder / file, shard)
        for entry in shard:
            shape = list(entry.shape)
            piece = {"offset": [0] * len(shape), "shape": shape, "file": file, "key": entry.key}
            tensors[entry.key] = {"shape": shape, "pieces": [piece]}
    for name in _copy_tokenizer(source, folder):
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": manifest.checksum(folder / name)}
    recipe = source.run.config if source.run else {"preset": "imported"}
    manifest.write(
        folder,
        Manifest(
            step=0,
            adam_step=0,
            tokens=source.run.tokens if source.run else 0,
            data="",
            config={**recipe, "model": to_jsonable(asdict(weights.config))},
            layout={"dp": 1, "pp": 1, "tp": 1, "sequence_parallel": False, "stages": []},
            code=source.run.code if source.run else "",
            written=datetime.now().astimezone().isoformat(timespec="seconds"),
            origin=str(source.path.absolute()),
            tensors=tensors,
            files=files,
        ),
    )


def export(weights: Weights, source: Source, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Write a Hugging Face directory, its tokenizer included, that `transformers` and vLLM load as Llama.

    Args:
        weights: to write.
        source: what they were made from.
        folder: exists.
        dtype: of the written weights.
        max_shard_bytes: of one file.
    """
    eos = 0
    if source.tokenizer:
        tokenizer = tokenizers_.load_tokenizer(source.tokenizer)
        eos = tokenizers_.eos_id(tokenizer, source.tokenizer)
        if TOKENIZER_CONFIG not in _copy_tokenizer(source, folder):
            # Documents are trained on one after another with this token between: it ends one and begins the next.
            described = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": tokenizer.id_to_token(eos),
                "eos_token": tokenizer.id_to_token(eos),
                "model_max_length": weights.config.max_seq_len,
                "clean_up_tokenization_spaces": False,
            }
            (folder / TOKENIZER_CONFIG).write_text(json.dumps(described, indent=2) + "\n", "utf-8")
    write_huggingface(weights, folder, dtype, max_shard_bytes, bos_id=eos, eos_id=eos)


def largest_difference(one: Weights, two: Weights, tokens_BL: torch.Tensor) -> float:
    """Compare two models' logits on the same tokens, with one layer in memory at a time.

    Returns:
        The largest difference, relative to the largest logit.
    """
    logits, others = streamed_logits(one, tokens_BL), streamed_logits(two, tokens_BL)
    return float((logits - others).abs().max() / logits.abs().max())


def real_tokens(source: Source, length: int) -> torch.Tensor:
    """Encode text of this interpreter's standard library in the source's tokens, int64 (1, at most `length`).

    Raises:
        BadInput: there is no tokenizer.
    """
    if source.tokenizer is None:
        raise BadInput([f"{source.path}: {TOKENIZER} is missing; beside the weights it would work"])
    text = Path(json.__file__).read_text("utf-8")
    ids = tokenizers_.load_tokenizer(source.tokenizer).encode(text).ids
    return torch.tensor([ids[: min(length, source.weights.config.max_seq_len)]])


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder to fill, which is renamed to `path` once it is complete, and deleted if that fails.

    Raises:
        BadInput: something is at `path` already.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise BadInput([f"{path}: is there already, and is not overwritten; another path, or an empty one, would work"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        unfinished.chmod(0o755)
    except OSError as error:
        raise BadInput([f"{path}: {error.strerror}; a folder that can be written would work"]) from None
    try:
        yield unfinished
        sync(unfinished)
        if path.exists():
            path.rmdir()
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _shape(run: Manifest) -> ModelConfig:
    """The model's shape as the run had it, with the default execution keys."""
    return ModelConfig(**{key: value for key, value in run.config["model"].items() if key not in EXECUTION_KEYS})


def _copy_tokenizer(source: Source, folder: Path) -> list[str]:
    """Copy tokenizer.json and the files that say which token ends a document; return the names copied."""
    if source.tokenizer is None:
        return []
    copied = []
    for name in (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json"):
        if (file := source.tokenizer.with_name(name)).exists():
            shutil.copyfile(file, folder / name)
            copied.append(name)
    return copied


def _check_tokenizer(tokenizer: Path, config: ModelConfig) -> None:
    size = tokenizers_.size(tokenizers_.load_tokenizer(tokenizer))
    if size > config.vocab_size:
        raise BadInput([f"{tokenizer}: its tokens need {size} rows, and the model has vocab_size={config.vocab_size}; "
                        "the tokenizer that the model was trained with would work"])  # fmt: skip
