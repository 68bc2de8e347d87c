"""Preparation of a corpus: its tokens are on disk, once, before training begins."""

import errno
import hashlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.train_settings import DataConfig, Source
from model.problems import BadInput
from train.data import cache, corpus
from train.data import tokenizer as tokenizers_
from train.data.packing import PackedSequences

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FORMAT = 2
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

    def train(self, seq_len: int) -> PackedSequences:
        """Open the training tokens as sequences of `seq_len` predictions."""
        return self._sequences("train", seq_len)

    def val(self, seq_len: int) -> PackedSequences:
        """Open the held-out tokens as sequences of `seq_len` predictions."""
        return self._sequences("val", seq_len)

    def tokenizer(self) -> "Tokenizer":
        """Load the tokenizer that the files were made with; it encodes the names of special tokens as plain text."""
        return tokenizers_.load_tokenizer(self.tokenizer_path)

    def _sequences(self, split: str, seq_len: int) -> PackedSequences:
        sequences = PackedSequences(self.folder / f"{split}.bin", self.dtype, seq_len, vocab_size=self.tokenizer_size)
        expected = self.num_train_tokens if split == "train" else self.num_val_tokens
        if sequences.num_tokens != expected:
            raise sequences.changed(f"has {sequences.num_tokens:,} of {expected:,} tokens")
        return sequences


def prepare(
    data: DataConfig, vocab_size: int, seq_len: int, *, progress: bool = True, verify: bool = False
) -> PreparedData:
    """Tokenise a corpus, or find it tokenised under `data.cache_dir`.

    Every rank may call it at once: one works and the others wait. As any of them may be the one, `progress` should be
    the same on all; those that wait show nothing.

    Args:
        data: the corpus, the tokenizer and the split.
        vocab_size: rows of the model's embedding, padding included.
        seq_len: predictions per sequence; only checked against, the cache suits every length.
        progress: show progress bars on stderr.
        verify: read all of what is prepared already and compare it with its checksums; else that is done where files
            are small or have been touched since.

    Raises:
        BadInput: with all problems found: wrong settings, a corpus or tokenizer that cannot be used or has more that
            cannot be used than `data.max_bad`, a tokenizer larger than `vocab_size`, too few tokens for one sequence of
            a split.
    """
    problems = corpus.check(data) + _check_sizes(data, vocab_size, seq_len)
    if problems:
        raise BadInput(problems)
    description = {
        "format": _FORMAT,
        "corpus": corpus.fingerprint_inputs(data),
        "val_fraction": float(data.val_fraction),
        "tokenizer": _describe_tokenizer(data, vocab_size),
    }
    fingerprint = cache.fingerprint(description)
    folder = Path(data.cache_dir).expanduser() / fingerprint
    with _writable(data, "be made"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with _writable(data, "be written", _FULL_OR_FORBIDDEN):
        build = partial(_build, data, vocab_size, description, progress)
        meta = cache.cached(folder, build, verify=verify)
    prepared = PreparedData(
        folder=folder,
        fingerprint=fingerprint,
        dtype=meta["dtype"],
        eos_id=meta["eos_id"],
        tokenizer_path=folder / "tokenizer.json",
        tokenizer_size=meta["tokenizer_size"],
        num_train_tokens=meta["tokens"]["train"],
        num_val_tokens=meta["tokens"]["val"],
        tally=meta["tally"],
    )
    problems = corpus.Tally(**prepared.tally).problems(data.max_bad)
    problems += _check_vocab(data, prepared.tokenizer_size, vocab_size) + _check_lengths(data, prepared, seq_len)
    if problems:
        raise BadInput(problems)
    return prepared


def _build(
    data: DataConfig, vocab_size: int, description: dict[str, Any], progress: bool, folder: Path
) -> dict[str, Any]:
    from train.data import build

    if data.tokenizer is None:
        texts = build.sample_texts(data, progress)
        tokenizer = tokenizers_.train_tokenizer(texts, _trained_size(data, vocab_size), progress=progress)
        tokenizer.save(str(folder / "tokenizer.json"))
        eos, encoder = tokenizers_.eos_id(tokenizer), tokenizers_.Encoder(tokenizer)
    else:
        file = tokenizers_.tokenizer_file(data.tokenizer)
        tokenizer = tokenizers_.load_tokenizer(data.tokenizer)
        problems = _check_vocab(data, tokenizers_.size(tokenizer), vocab_size)
        try:
            eos = tokenizers_.eos_id(tokenizer, data.tokenizer)
            encoder = tokenizers_.Encoder(tokenizer, f"data.tokenizer={data.tokenizer}")
            problems += encoder.problems(eos)
        except BadInput as error:
            problems += error.problems
        if problems:  # known here, before hours of tokenising
            raise BadInput(problems)
        shutil.copyfile(file, folder / "tokenizer.json")
        if (config := tokenizers_.config_file(file)).is_file():
            shutil.copyfile(config, folder / config.name)
    size = tokenizers_.size(tokenizer)
    dtype = "uint16" if size <= 1 << 16 else "uint32"
    tokens, tally = build.tokenise(data, encoder, eos, dtype, folder, progress)
    print(f"corpus: {tally.summary()}; {sum(tokens.values()):,} tokens", file=sys.stderr)
    if not tally.documents:
        raise BadInput([_no_documents(data, tally)])
    if corpus.fingerprint_inputs(data) != description["corpus"]:
        raise BadInput([f"data.path={data.path}: files of the corpus have changed while it was prepared; the same "
                        "command would work once nobody writes to them"])  # fmt: skip
    return {
        "dtype": dtype,
        "eos_id": eos,
        "tokenizer_size": size,
        "tokens": tokens,
        "tally": tally.as_dict(),
        "description": description,
    }


def _trained_size(data: DataConfig, vocab_size: int) -> int:
    return data.tokenizer_vocab_size or min(vocab_size, tokenizers_.DEEPSEEK_VOCAB)


def _describe_tokenizer(data: DataConfig, vocab_size: int) -> dict[str, Any]:
    """What decides the tokenizer: the content of a given one, the recipe of one to be trained."""
    if data.tokenizer is None:
        size = _trained_size(data, vocab_size)
        return {"recipe": tokenizers_.RECIPE, "size": size, "sample_mb": data.tokenizer_sample_mb}
    file = tokenizers_.tokenizer_file(data.tokenizer)
    files = [file, tokenizers_.config_file(file)]
    try:
        return {f.name: hashlib.blake2b(f.read_bytes()).hexdigest() for f in files if f.is_file()}
    except OSError as error:
        raise BadInput([f"data.tokenizer={data.tokenizer}: cannot be read ({error}); a readable tokenizer.json "
                        "would work"]) from error  # fmt: skip


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
                f"data.tokenizer_vocab_size={vocab_size}, or model.vocab_size={_rounded(size)}, would work"
            )
    return problems


def _check_vocab(data: DataConfig, size: int, vocab_size: int) -> list[str]:
    if size <= vocab_size:
        return []
    padded = _rounded(size)
    also = "" if padded == size else f" (or {padded}, the next multiple of 128, which is faster)"
    which = data.tokenizer or "trained on the corpus"
    return [f"model.vocab_size={vocab_size}: the tokenizer {which} has {size} tokens; "
            f"model.vocab_size={size}{also} would work"]  # fmt: skip


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


def _rounded(size: int) -> int:
    return -(-size // 128) * 128


def _no_documents(data: DataConfig, tally: corpus.Tally) -> str:
    key = "name" if data.source is Source.hub else "path" if data.source is Source.files else "source"
    value = data.source.value if key == "source" else getattr(data, key)
    hint = ", a JSON object on each line," if tally.bad_json else ""
    hint += f", with the text in data.text_field={data.text_field}," if tally.no_text else ""
    hint = hint.replace(",,", ",")
    return f"data.{key}={value}: no usable document ({tally.summary()}); UTF-8 text{hint} would work"


_FULL_OR_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


@contextmanager
def _writable(data: DataConfig, fails_to: str, codes: tuple[int, ...] | None = None) -> Iterator[None]:
    """Say which setting is at fault when the cache cannot be made or written; other codes than these pass, if given."""
    try:
        yield
    except OSError as error:
        if codes is not None and error.errno not in codes:
            raise
        raise BadInput([f"data.cache_dir={data.cache_dir}: cannot {fails_to} ({error}); a folder with room in it "
                        "would work"]) from error  # fmt: skip
