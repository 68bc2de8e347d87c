"""Trained weights by path, whoever wrote them: a run, one of its checkpoints, or a Hugging Face directory."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from conf.paths import checked as checked_path
from conf.schema import to_jsonable
from model.config import EXECUTION_KEYS, ModelConfig
from model.huggingface import open_huggingface, write_huggingface
from model.huggingface_files import read_object, weight_files
from model.problems import BadInput
from model.transformer import full_shapes
from model.weights import (
    EMBEDDING,
    HEAD,
    StoredWeights,
    Weights,
    entries,
    not_finite,
    shards,
    streamed_logits,
    write_safetensors,
)
from train.checkpoint import manifest
from train.checkpoint.folder import below
from train.checkpoint.manifest import Damaged, Manifest
from train.data import tokenizer as tokenizers_
from train.files import sync

TOKENIZER, TOKENIZER_CONFIG, DESCRIPTION = "tokenizer.json", "tokenizer_config.json", "config.json"
_GENERATION = "generation_config.json"
_GO_ALONG = (
    *(TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", _GENERATION),
)
"""What lies beside weights and says how they are spoken to; every conversion takes it over as it is."""
_PLAIN_EOS = 2
"""The end that `transformers` takes for a Llama whose config.json names none."""


@dataclass(frozen=True)
class Source:
    """Weights, and what is known of them.

    Attributes:
        path: of the folder that holds them.
        weights: read one tensor at a time.
        tokenizer: the tokenizer.json beside them, if there is one.
        run: the manifest of a checkpoint of ours; None for a Hugging Face directory.
        described: the config.json of a Hugging Face directory, or that a checkpoint has from the one it was made of;
            None for a run of ours.
    """

    path: Path
    weights: StoredWeights
    tokenizer: Path | None
    run: Manifest | None
    described: Mapping[str, Any] | None = None

    def has(self, name: str) -> bool:
        """Whether a file belongs to it; to a checkpoint of ours what its manifest lists."""
        return name in self.run.files if self.run else (self.path / name).is_file()


def open_source(path: str | os.PathLike[str], *, checked: bool = True, key: str = "source") -> Source:
    """Open the weights at a path; of a run, those of its newest sound checkpoint.

    Args:
        path: of a run, a checkpoint or a Hugging Face directory.
        checked: compare every file of ours with its checksum; another process may have.
        key: the setting or argument that names it.

    Raises:
        BadInput: nothing can be or is there, or it is damaged, or not Llama-shaped; by file and tensor.
    """
    path = checked_path(key, path).absolute()
    if (path / DESCRIPTION).exists() and not (path / manifest.MANIFEST).exists():
        return _open_huggingface(path, checked)
    reasons = []
    found = [path] if (path / manifest.MANIFEST).exists() else below(path)
    for candidate in found:
        try:
            run = manifest.read(candidate)
            if checked:
                manifest.check_files(candidate, run)
            shape = _shape(run)
        except Damaged as damage:
            reasons.append(f"{candidate}: {damage}")
            continue
        weights = StoredWeights(shape, candidate, {n: entry for n, entry in run.tensors.items() if "/" not in n})
        if checked and (problems := not_finite(weights)):
            raise BadInput(problems)
        tokenizer = candidate / TOKENIZER if TOKENIZER in run.files else None
        described = _object(candidate / DESCRIPTION) if DESCRIPTION in run.files else None
        return Source(candidate, weights, tokenizer, run, described)
    works = "a run folder, such as `deepnarrow runs` lists, one of its checkpoints/step-…, or a Hugging Face directory "
    works += "with config.json would work"
    raise BadInput(reasons or [f"{path}: no weights are there; {works}"])


def _open_huggingface(path: Path, checked: bool) -> Source:
    try:
        weights = open_huggingface(path)
    except ValueError as error:
        raise BadInput(str(error).splitlines()) from None
    tokenizer = path / TOKENIZER if (path / TOKENIZER).exists() else None
    if tokenizer:
        _check_tokenizer(tokenizer, weights.config)
    if checked:
        if problems := not_finite(weights):
            raise BadInput(problems)
        for note in weights.notes:
            print(note, file=sys.stderr)
    return Source(path, weights, tokenizer, None, _object(path / DESCRIPTION))


def ends_of(source: Source) -> set[int]:
    """The tokens that end a text, as `transformers` finds them beside weights that come from elsewhere.

    Raises:
        BadInput: they are no token ids.
    """
    assert source.described is not None
    said = _object(source.path / _GENERATION) if source.has(_GENERATION) else {}
    where, ends = _GENERATION, said.get("eos_token_id")
    if ends is None:
        where, ends = DESCRIPTION, source.described.get("eos_token_id", _PLAIN_EOS)
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(end, int) and not isinstance(end, bool) for end in listed):
        raise BadInput([f"{source.path / where}: eos_token_id={ends}: is no token id; a whole number would work"])
    return set(listed)


def left_behind(source: Source) -> list[str]:
    """What of a Hugging Face directory a conversion does not take along, besides other weights; a sentence each."""
    if source.run is not None or source.described is None:
        return []
    taken = {*_GO_ALONG, DESCRIPTION, *weight_files(source.path)}
    names = sorted(path.name for path in source.path.iterdir() if path.name not in taken and path.name[0] != ".")
    lines = [f"{source.path}: not taken along: {', '.join(names)}"] if names else []
    if "auto_map" in source.described:
        lines.append(f"{source.path / DESCRIPTION}: auto_map: not taken along, as it names code")
    return lines


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
    tied = source.weights.tied
    distinct = [entry for entry in entries(weights, torch.float32) if not (tied and entry.key == HEAD)]
    for number, shard in enumerate(shards(distinct, max_shard_bytes)):
        file = f"weights{number:05d}.safetensors"
        files[file] = write_safetensors(folder / file, shard)
        for entry in shard:
            shape = list(entry.shape)
            piece = {"offset": [0] * len(shape), "shape": shape, "file": file, "key": entry.key}
            tensors[entry.key] = {"shape": shape, "pieces": [piece]}
    if tied:
        tensors[HEAD] = tensors[EMBEDDING]
    for name in _copy(source, folder, *([DESCRIPTION] if source.described is not None else [])):
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
            history=source.run.history if source.run else None,
        ),
    )


def export(weights: Weights, source: Source, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Write a Hugging Face directory, its tokenizer included, that `transformers` and vLLM load as Llama.

    With windows it is a Mistral, or a Ministral where some layers have none (`model.huggingface.config_there`).

    Args:
        weights: to write.
        source: what they were made from.
        folder: exists.
        dtype: of the written weights.
        max_shard_bytes: of one file.
    """
    copied = _copy(source, folder)
    bos = eos = 0
    if source.described is None and source.tokenizer:
        tokenizer = tokenizers_.load_tokenizer(source.tokenizer)
        # Documents are trained on one after another with this token between: it ends one and begins the next.
        bos = eos = tokenizers_.eos_id(tokenizer, source.tokenizer)
        if TOKENIZER_CONFIG in copied:
            begins = tokenizers_.bos_id(tokenizer, source.tokenizer)
            bos = eos if begins is None else begins
        else:
            token = tokenizer.id_to_token(eos)
            described = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": token,
                "eos_token": token,
                "model_max_length": weights.config.max_seq_len,
                "clean_up_tokenization_spaces": False,
            }
            (folder / TOKENIZER_CONFIG).write_text(json.dumps(described, indent=2) + "\n", "utf-8")
    write_huggingface(
        weights,
        folder,
        dtype,
        max_shard_bytes,
        bos_id=bos,
        eos_id=eos,
        tied=source.weights.tied,
        described=source.described,
    )


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
    """The model's shape as the run had it, with the default execution keys.

    Raises:
        Damaged: the manifest describes no model, or another than its tensors are of.
    """
    try:
        config = ModelConfig(**{key: value for key, value in run.config["model"].items() if key not in EXECUTION_KEYS})
        if config.problems():
            raise Damaged(f"{manifest.MANIFEST} describes no model: {config.problems()[0]}")
    except (KeyError, TypeError, AttributeError):
        raise Damaged(f"{manifest.MANIFEST} describes no model") from None
    for name, shape in full_shapes(config).items():
        if (there := run.tensors.get(name, {}).get("shape")) != list(shape):
            raise Damaged(f"{manifest.MANIFEST} has {name} of shape {there}, and its model {list(shape)}")
    return config


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except ValueError as error:
        raise BadInput([str(error)]) from None


def _copy(source: Source, folder: Path, *more: str) -> list[str]:
    """Copy what goes along with the weights of a source; return the names copied."""
    copied = [name for name in (*_GO_ALONG, *more) if source.has(name)]
    for name in copied:
        shutil.copyfile(source.path / name, folder / name)
    return copied


def _check_tokenizer(tokenizer: Path, config: ModelConfig) -> None:
    size = tokenizers_.size(tokenizers_.load_tokenizer(tokenizer))
    if size > config.vocab_size:
        raise BadInput([f"{tokenizer}: its tokens need {size} rows, and the model has vocab_size={config.vocab_size}; "
                        "the tokenizer that the model was trained with would work"])  # fmt: skip
