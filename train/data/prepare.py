"""Preparation of a corpus: its tokens are on disk, once, before training begins."""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from conf.paths import expanded
from conf.train_settings import DataConfig, Packing, Source
from model.problems import BadInput
from train.data import cache, corpus
from train.data import tokenizer as tokenizers_
from train.data.best_fit import BestFitSequences, Cut, open_best_fit
from train.data.given import describe_tokens, given_ends, is_given, open_tokens
from train.data.packing import FileTokens, PackedSequences, Sequences, TokenFile
from train.data.shards import SPLITS, ends_file, token_file
from train.data.tokenise import INDEX, reopen, tokenise_corpus
from train.data.tokenizer_cache import PreparedTokenizer, prepare_tokenizer, rounded, tokenizer_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FORMAT = 4
"""Raise it when the files of a prepared corpus change in meaning."""


@dataclass(frozen=True)
class PreparedData:
    """A corpus as token files, split and with its tokenizer."""

    folder: Path
    """The cache folder that holds all of it."""
    fingerprint: str
    """Hash of all that shaped it; runs with the same one saw the same tokens."""
    dtype: str
    """Of the token files: uint16 or uint32."""
    eos_id: int
    """The token after every document."""
    tokenizer_path: Path
    """The tokenizer.json in `folder`."""
    tokenizer_size: int
    """Token ids are below it."""
    num_train_tokens: int
    """Training tokens, end tokens included."""
    num_val_tokens: int
    """Held-out tokens, end tokens included; 0 when data.val_fraction is 0."""
    tally: dict[str, Any]
    """What was read and skipped: the fields of `Tally`."""
    packing: Packing = Packing.concat
    """How training documents are put into sequences."""

    def train(self, seq_len: int) -> Sequences:
        """Open the training tokens as sequences of `seq_len` predictions."""
        return self._sequences("train", seq_len) if self.packing is Packing.concat else self.best_fit(seq_len)[0]

    def best_fit(self, seq_len: int) -> tuple[BestFitSequences, Cut]:
        """Open the training tokens best-fit packed, which is made and kept when it is asked for first.

        Raises:
            BadInput: where documents end is not known, or not in the end token, or the cache cannot be written.
        """
        concatenated, ends = self._sequences("train", seq_len), partial(self.ends, "train")
        with _writable(self.folder.parent, "be written", _FULL_OR_FORBIDDEN):
            return open_best_fit(concatenated, ends, self.eos_id, self.fingerprint, self.folder.parent)

    def val(self, seq_len: int) -> PackedSequences:
        """Open the held-out tokens as sequences of `seq_len` predictions."""
        return self._sequences("val", seq_len)

    def tokenizer(self) -> "Tokenizer":
        """Load the tokenizer that the files were made with; it encodes the names of special tokens as plain text."""
        return tokenizers_.load_tokenizer(self.tokenizer_path)

    def ends(self, split: str) -> Iterator[NDArray[np.int64]]:
        """Yield where the documents of a split end, shard by shard: tokens before it in the split, end token included.

        Args:
            split: `train` or `val`.

        Raises:
            BadInput: of token files made elsewhere, whose documents are not known.
        """
        if is_given(self.folder):
            known = given_ends(self.folder, split)
            if known is None:
                said = "data.packing=best_fit: the token files do not say where documents end"
                raise BadInput([f"{said}; data.packing=concat, or files with an .idx or .index, would work"])
            yield np.asarray(known)
            return
        before = 0
        for index, (tokens, documents) in enumerate(self._index(split)):
            if documents:
                yield np.fromfile(ends_file(self.folder, index, split), np.int64) + before
            before += int(tokens)

    def _sequences(self, split: str, seq_len: int) -> PackedSequences:
        if is_given(self.folder):
            given = open_tokens(self.folder, split, self.eos_id)
            return PackedSequences(given, seq_len, vocab_size=self.tokenizer_size)
        files = [
            TokenFile(token_file(self.folder, index, split), self.dtype, int(tokens))
            for index, (tokens, _) in enumerate(self._index(split))
        ]
        return PackedSequences(FileTokens(files), seq_len, vocab_size=self.tokenizer_size)

    def _index(self, split: str) -> NDArray[np.int64]:
        """Tokens and documents of each shard, (shards, 2)."""
        index: NDArray[np.int64] = np.load(self.folder / INDEX)
        return index[:, SPLITS.index(split)]


def prepare(
    data: DataConfig, vocab_size: int, seq_len: int, *, progress: bool = True, verify: bool = False
) -> PreparedData:
    """Prepare one corpus: `prepare_sources` of it alone."""
    sources = {data.source.value: data}
    return prepare_sources(sources, vocab_size, seq_len, progress=progress, verify=verify)[data.source.value]


def prepare_sources(
    sources: Mapping[str, DataConfig], vocab_size: int, seq_len: int, *, progress: bool = True, verify: bool = False
) -> dict[str, PreparedData]:
    """Tokenise corpora with one tokenizer, or find them tokenised under `data.cache_dir`.

    Every rank may call it at once: one works and the others wait. As any of them may be the one, `progress` should be
    the same on all; those that wait show nothing. Each corpus is kept under a fingerprint of its own, so that a
    mixture with another corpus besides, or with other weights, prepares nothing again where the tokenizer is given.

    Args:
        sources: the corpora by name, of which `corpora` makes one or several; they agree in all that is not a corpus's
            own, the tokenizer, the split and the folder of the cache.
        vocab_size: rows of the model's embedding, padding included.
        seq_len: predictions per sequence, the largest that is asked for; only checked against, the cache suits every
            length.
        progress: show progress bars on stderr.
        verify: read all of what is prepared already and compare it with its checksums; else that is done where files
            are small or have been touched since.

    Returns:
        What is prepared of each, under its name.

    Raises:
        BadInput: with all problems found: wrong settings, a corpus or tokenizer that cannot be used or has more that
            cannot be used than `data.max_bad`, a tokenizer larger than `vocab_size`, too few tokens for one sequence of
            a split.
    """
    given = next(iter(sources.values()))
    with _all_problems() as problems:
        problems += check_sources(sources)
        problems += _check_sizes(given, vocab_size, seq_len)
    with _writable(given.cache_dir, "be made"):
        expanded(given.cache_dir).mkdir(parents=True, exist_ok=True)
    with _writable(given.cache_dir, "be written", _FULL_OR_FORBIDDEN):
        tokenizer = prepare_tokenizer(sources, vocab_size, progress=progress, verify=verify)
    prepared = {}
    with _all_problems() as problems:
        for name, data in sources.items():
            try:
                with _writable(data.cache_dir, "be written", _FULL_OR_FORBIDDEN):
                    prepared[name] = _prepare_corpus(data, tokenizer, progress, verify)
            except BadInput as error:
                problems += corpus.of_source(sources, name, error.problems)
                continue
            unusable = corpus.Tally(**prepared[name].tally).problems(data.max_bad)
            problems += corpus.of_source(sources, name, unusable + _check_lengths(data, prepared[name], seq_len))
    return prepared


def check_sources(sources: Mapping[str, DataConfig]) -> list[str]:
    """Check the settings of corpora, without reading them; a sentence for each problem."""
    return [
        problem
        for name, data in sources.items()
        for problem in corpus.of_source(sources, name, corpus.check(data), own=False)
    ]


@contextmanager
def _all_problems() -> Iterator[list[str]]:
    """Collect problems, each once, and raise them together."""
    problems: list[str] = []
    yield problems
    if problems:
        raise BadInput(list(dict.fromkeys(problems)))


def already_prepared(sources: Mapping[str, DataConfig], vocab_size: int) -> bool:
    """Tell whether `prepare_sources` would find all that it is asked for, and so read no corpus.

    Args:
        sources: the corpora by name.
        vocab_size: rows of the model's embedding.
    """
    try:
        tokenizer = tokenizer_folder(sources, vocab_size)
        described = [(data, cache.fingerprint(_description(data, tokenizer.name))) for data in sources.values()]
    except BadInput:  # it is not there, or not readable from here
        return False
    return all(map(cache.sound, [tokenizer, *(expanded(data.cache_dir) / name for data, name in described)]))


def _description(data: DataConfig, tokenizer: str) -> dict[str, Any]:
    """What decides the tokens of a corpus; its tokenizer is known by its fingerprint."""
    return {
        "format": _FORMAT,
        "corpus": corpus.fingerprint_inputs(data),
        "val_fraction": float(data.val_fraction),
        "tokenizer": tokenizer,
    }


def _prepare_corpus(data: DataConfig, tokenizer: PreparedTokenizer, progress: bool, verify: bool) -> PreparedData:
    description = _description(data, tokenizer.fingerprint)
    fingerprint = cache.fingerprint(description)
    folder = expanded(data.cache_dir) / fingerprint
    if data.source is Source.tokens:
        meta = cache.cached(folder, partial(describe_tokens, data, tokenizer), verify=verify)
    else:
        meta = _tokenised(data, tokenizer, description, folder, progress, verify)
    return PreparedData(
        folder=folder,
        fingerprint=fingerprint,
        dtype=meta["dtype"],
        eos_id=meta["eos_id"],
        tokenizer_path=folder / "tokenizer.json",
        tokenizer_size=meta["tokenizer_size"],
        num_train_tokens=meta["tokens"]["train"],
        num_val_tokens=meta["tokens"]["val"],
        tally=meta["tally"],
        packing=data.packing,
    )


def _tokenised(
    data: DataConfig,
    tokenizer: PreparedTokenizer,
    description: dict[str, Any],
    folder: Path,
    progress: bool,
    verify: bool,
) -> dict[str, Any]:
    meta, damage = cache.read(folder, verify)
    for _ in range(_TRIES):
        if meta is not None:
            return meta
        if folder.exists():
            reopen(folder, damage)
        tokenise_corpus(data, tokenizer, description, folder, progress)
        meta, damage = cache.read(folder)
    if meta is not None:
        return meta
    raise BadInput([f"data.cache_dir={data.cache_dir}: {folder} is damaged ({damage}) however often it is prepared; a "
                    "disk that keeps what is written would work"])  # fmt: skip


def _check_sizes(data: DataConfig, vocab_size: int, seq_len: int) -> list[str]:
    """What is wrong with the sizes before the corpus is known."""
    problems = []
    if seq_len < 1:
        problems.append(f"train.seq_len={seq_len}: a sequence predicts at least one token; 1 or more would work")
    if data.tokenizer is None:
        size = data.tokenizer_vocab_size
        if size is None and vocab_size < tokenizers_.MIN_VOCAB:
            problems.append(tokenizers_.too_small("model.vocab_size", vocab_size))
        if size is not None and size > vocab_size:
            problems.append(
                f"data.tokenizer_vocab_size={size}: the model has only model.vocab_size={vocab_size} tokens; "
                f"data.tokenizer_vocab_size={vocab_size}, or model.vocab_size={rounded(size)}, would work"
            )
    return problems


def _check_lengths(data: DataConfig, prepared: PreparedData, seq_len: int) -> list[str]:
    """Whether each split that is wanted has at least one sequence."""
    problems = []
    train, val = prepared.num_train_tokens, prepared.num_val_tokens
    if train <= seq_len:
        problems.append(
            f"train.seq_len={seq_len}: the corpus has only {train} training tokens and one sequence takes "
            f"{seq_len + 1}; {_shorter(train)}a larger corpus would work"
        )
    if data.val_fraction > 0 and val <= seq_len:
        said = f"data.val_fraction={data.val_fraction}"
        if val == 0:
            problems.append(
                f"{said}: the corpus is one document, or copies of one, and nothing can be held out; "
                "data.document_separator (to cut plain text into documents), or data.val_fraction=0, would work"
            )
        else:
            problems.append(
                f"{said}: only {val} tokens are held out and one sequence of train.seq_len={seq_len} takes "
                f"{seq_len + 1}; {_shorter(val)}a larger data.val_fraction, or data.val_fraction=0 (no validation), "
                "would work"
            )
    return problems


def _shorter(tokens: int) -> str:
    """The largest power of two that a split of so many tokens has a sequence of, as the start of a suggestion."""
    return f"train.seq_len={1 << ((tokens - 1).bit_length() - 1)}, or " if tokens >= 2 else ""


_TRIES = 3
_FULL_OR_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


@contextmanager
def _writable(cache_dir: str | Path, fails_to: str, codes: tuple[int, ...] | None = None) -> Iterator[None]:
    """Say which setting is at fault when the cache cannot be made or written; other codes than these pass, if given."""
    try:
        yield
    except OSError as error:
        if codes is not None and error.errno not in codes:
            raise
        raise BadInput([f"data.cache_dir={cache_dir}: cannot {fails_to} ({error}); a folder with room in it "
                        "would work, and what is done already stays"]) from error  # fmt: skip
