"""The tokenizer of one corpus or of several: a given one, checked, or one that is trained on a sample of all."""

import hashlib
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.paths import expanded
from conf.train_settings import DataConfig, Source
from model.problems import BadInput
from train.data import cache, corpus
from train.data import tokenizer as tokenizers_
from train.data.units import Unit, joined, units_of
from train.data.workers import default_workers, work_through

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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
    sampled: Mapping[str, int]
    """What it was trained on of each corpus, by the corpus's fingerprint, as `sample_texts` says; empty for a given
    one."""

    def sampled_of(self, data: DataConfig) -> int | None:
        """Say what it was trained on of a corpus, as `sample_texts` does; None where that is not known."""
        return self.sampled.get(_corpus_fingerprint(data))

    @property
    def path(self) -> Path:
        """The tokenizer.json."""
        return self.folder / FILE

    @property
    def dtype(self) -> str:
        """The smallest type of the ids that token files have: uint16 or uint32."""
        return "uint16" if self.size <= 1 << 16 else "uint32"

    def copy_to(self, folder: Path) -> None:
        """Copy its files into a folder."""
        _copy(self.path, folder)


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
    data, folder = next(iter(sources.values())), tokenizer_folder(sources, vocab_size)
    build = partial(_build, sources, vocab_size, progress)
    meta = cache.cached(folder, build, verify=verify)
    if problems := check_vocab(data, meta["size"], vocab_size):
        raise BadInput(problems)
    return PreparedTokenizer(folder, folder.name, meta["size"], meta["eos_id"], _said(data), meta.get("sampled", {}))


def tokenizer_folder(sources: Mapping[str, DataConfig], vocab_size: int) -> Path:
    """Name the cache folder of a tokenizer by its fingerprint; arguments are those of `prepare_tokenizer`.

    Raises:
        BadInput: a given tokenizer, or a corpus that one is to be trained on, cannot be read.
    """
    fingerprint = cache.fingerprint(_description(sources, vocab_size))
    return expanded(next(iter(sources.values())).cache_dir) / "tokenizers" / fingerprint


def _copy(file: Path, folder: Path) -> None:
    """Copy a tokenizer, and the tokenizer_config.json beside it if there is one."""
    shutil.copyfile(file, folder / FILE)
    if (config := tokenizers_.config_file(file)).is_file():
        shutil.copyfile(config, folder / config.name)


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
        tokenizer, sampled = _trained(sources, _trained_size(data, vocab_size), progress)
        tokenizer.save(str(folder / FILE))
        return {"size": tokenizers_.size(tokenizer), "eos_id": tokenizers_.eos_id(tokenizer), "sampled": sampled}
    tokenizer = tokenizers_.load_tokenizer(data.tokenizer)
    problems = check_vocab(data, tokenizers_.size(tokenizer), vocab_size)
    try:
        eos = tokenizers_.eos_id(tokenizer, data.tokenizer)
        problems += tokenizers_.Encoder(tokenizer, _said(data)).problems(eos)
    except BadInput as error:
        problems += error.problems
    if problems:
        raise BadInput(problems)
    _copy(tokenizers_.tokenizer_file(data.tokenizer), folder)
    return {"size": tokenizers_.size(tokenizer), "eos_id": eos}


def _trained(sources: Mapping[str, DataConfig], size: int, progress: bool) -> tuple["Tokenizer", dict[str, int]]:
    """Train on an equal share of the sample from each corpus; returns what was taken of each as well."""
    sampled = {}

    def texts() -> Iterator[str]:
        for name, data in sources.items():
            try:
                taken, limit = sample_texts(data, data.tokenizer_sample_mb * 10**6 // len(sources), progress)
            except BadInput as error:
                raise BadInput(corpus.of_source(sources, name, error.problems)) from error
            sampled[_corpus_fingerprint(data)] = limit
            yield from taken

    return tokenizers_.train_tokenizer(texts(), size, progress=progress), sampled


def _corpus_fingerprint(data: DataConfig) -> str:
    return cache.fingerprint(corpus.fingerprint_inputs(data))


def sample_texts(data: DataConfig, budget: int, progress: bool) -> tuple[Iterator[str], int]:
    """Sample at most `budget` bytes of text to train a tokenizer on.

    Of files, the pieces of documents with the smallest hashes: spread evenly over the corpus, and the same whatever the
    order of documents and whoever reads them. Of a hub dataset, which may be of any length, its beginning.

    Returns:
        The pieces, and what all of their hashes are below and no other piece's is; of a hub dataset, how many bytes its
        beginning has at most.

    Raises:
        BadInput: none of it can be used, or more of it is unusable than `data.max_bad` allows.
    """
    from tqdm import tqdm

    from train.data.build import Sample, SampledUnit, sample_unit

    if problems := corpus.check_tables(data):
        raise BadInput(problems)
    units = units_of(data)
    sample, tallies, left = Sample(budget), dict[int, corpus.Tally](), iter(range(len(units)))
    total = sum(part.size for unit in units for part in unit) or None
    workers = max(1, min(data.workers or default_workers(), len(units)))
    lock = threading.Lock()

    def next_call() -> tuple[Any, ...] | None:
        with lock:
            index = next(left, None)
        return None if index is None else (sample_unit, index, budget, sample.limit)

    with tqdm(desc="sampling", total=total, file=sys.stderr, disable=not progress, unit="B", unit_scale=True) as bar:

        def take(unit: SampledUnit) -> None:
            tallies[unit.index] = unit.tally
            sample.restrict(unit.limit)
            for key, piece in unit.pieces:
                sample.add(key, piece)
            bar.update(unit.tally.bytes_read)

        work_through((_pair, (data, units)), workers, next_call, take)
    tally = joined(units, [tallies[index] for index in range(len(units))])
    if problems := tally.problems(data.max_bad) or ([] if tally.documents else [corpus.no_documents(data, tally)]):
        raise BadInput(problems)  # known here, before hours of tokenising
    return (piece for _, piece in sample.pieces()), budget if data.source is Source.hub else sample.limit


def _pair(data: DataConfig, units: list[Unit]) -> tuple[DataConfig, list[Unit]]:
    return data, units
