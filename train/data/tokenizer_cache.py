"""The tokenizer of one corpus or of several: a given one, checked, or one that is trained on a sample of all."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from conf.paths import expanded
from conf.train_settings import DataConfig
from model.problems import BadInput
from train.data import cache, corpus
from train.data import tokenizer as tokenizers_

FILE = "tokenizer.json"


@dataclass(frozen=True)
class PreparedTokenizer:
    """A tokenizer that corpora can be tokenised with, on disk."""

    folder: Path
    """The cache folder that holds its files."""
    fingerprint: str
    """Hash of a given tokenizer's files, or of the recipe and the corpora of a trained one."""
    size: int
    """Token ids are below it."""
    eos_id: int
    """The token that ends a document."""
    said: str
    """The setting that gave it, for messages."""

    @property
    def path(self) -> Path:
        """The tokenizer.json."""
        return self.folder / FILE

    @property
    def dtype(self) -> str:
        """The smallest type of the ids that token files have: uint16 or uint32."""
        return "uint16" if self.size <= 1 << 16 else "uint32"

    def encoder(self) -> tokenizers_.Encoder:
        """Load it to encode documents."""
        return tokenizers_.Encoder(tokenizers_.load_tokenizer(self.path), self.said)

    def copy_to(self, folder: Path) -> None:
        """Copy its files into a folder."""
        for file in (self.path, tokenizers_.config_file(self.path)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def prepare_tokenizer(
    sources: Mapping[str, DataConfig], vocab_size: int, *, progress: bool, verify: bool = False
) -> PreparedTokenizer:
    """Take over the given tokenizer, or train one; or find that done under `data.cache_dir`.

    Args:
        sources: the corpora that share it, and so its settings.
        vocab_size: rows of the model's embedding.
        progress: show progress bars on stderr.
        verify: compare the files with their checksums although they have not been touched.

    Raises:
        BadInput: a given tokenizer cannot be used or is larger than `vocab_size`, or the corpora have no text to train
            one on.
    """
    data = next(iter(sources.values()))
    description = _description(sources, vocab_size)
    fingerprint = cache.fingerprint(description)
    folder = expanded(data.cache_dir) / "tokenizers" / fingerprint
    build = partial(_build, sources, vocab_size, progress)
    meta = cache.cached(folder, build, verify=verify)
    if problems := check_vocab(data, meta["size"], vocab_size):
        raise BadInput(problems)
    return PreparedTokenizer(folder, fingerprint, meta["size"], meta["eos_id"], _said(data))


def check_vocab(data: DataConfig, size: int, vocab_size: int) -> list[str]:
    """Check that a tokenizer of `size` ids fits the model's embedding."""
    if size <= vocab_size:
        return []
    padded = rounded(size)
    also = "" if padded == size else f" (or {padded}, the next multiple of 128, which is faster)"
    which = data.tokenizer or "trained on the corpus"
    return [f"model.vocab_size={vocab_size}: the tokenizer {which} has {size} tokens; "
            f"model.vocab_size={size}{also} would work"]  # fmt: skip


def rounded(size: int) -> int:
    """Round a vocabulary up to a multiple of 128, with which matrix products are faster."""
    return -(-size // 128) * 128


def _said(data: DataConfig) -> str:
    return "data.tokenizer" if data.tokenizer is None else f"data.tokenizer={data.tokenizer}"


def _description(sources: Mapping[str, DataConfig], vocab_size: int) -> dict[str, Any]:
    """What decides the tokenizer: the content of a given one; the recipe of one to be trained, and its corpora."""
    data = next(iter(sources.values()))
    if data.tokenizer is None:
        inputs = [corpus.fingerprint_inputs(each) for each in sources.values()]
        return {
            "recipe": tokenizers_.RECIPE,
            "size": _trained_size(data, vocab_size),
            "sample_mb": data.tokenizer_sample_mb,
            "corpora": sorted(inputs, key=cache.fingerprint),
        }
    file = tokenizers_.tokenizer_file(data.tokenizer)
    files = [file, tokenizers_.config_file(file)]
    try:
        return {f.name: hashlib.blake2b(f.read_bytes()).hexdigest() for f in files if f.is_file()}
    except OSError as error:
        raise BadInput([f"data.tokenizer={data.tokenizer}: cannot be read ({error}); a readable tokenizer.json "
                        "would work"]) from error  # fmt: skip


def _trained_size(data: DataConfig, vocab_size: int) -> int:
    return data.tokenizer_vocab_size or min(vocab_size, tokenizers_.DEEPSEEK_VOCAB)


def _build(sources: Mapping[str, DataConfig], vocab_size: int, progress: bool, folder: Path) -> dict[str, Any]:
    data = next(iter(sources.values()))
    if data.tokenizer is None:
        tokenizer = _trained(list(sources.values()), _trained_size(data, vocab_size), progress)
        tokenizer.save(str(folder / FILE))
        return {"size": tokenizers_.size(tokenizer), "eos_id": tokenizers_.eos_id(tokenizer)}
    tokenizer = tokenizers_.load_tokenizer(data.tokenizer)
    problems = check_vocab(data, tokenizers_.size(tokenizer), vocab_size)
    try:
        eos = tokenizers_.eos_id(tokenizer, data.tokenizer)
        problems += tokenizers_.Encoder(tokenizer, _said(data)).problems(eos)
    except BadInput as error:
        problems += error.problems
    if problems:
        raise BadInput(problems)
    file = tokenizers_.tokenizer_file(data.tokenizer)
    shutil.copyfile(file, folder / FILE)
    if (config := tokenizers_.config_file(file)).is_file():
        shutil.copyfile(config, folder / config.name)
    return {"size": tokenizers_.size(tokenizer), "eos_id": eos}


def _trained(sources: Sequence[DataConfig], size: int, progress: bool) -> Any:
    """Train on an equal share of the sample from each corpus."""
    from train.data import build

    budget = sources[0].tokenizer_sample_mb * 10**6 // len(sources)
    texts = (text for data in sources for text in build.sample_texts(data, budget, progress))
    return tokenizers_.train_tokenizer(texts, size, progress=progress)
