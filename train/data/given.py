"""Corpora that are token files already: read where they lie, by their indexes, and split without being copied.

The end of each file is held out, `data.val_fraction` of its tokens, from a document's beginning on where documents are
known. Hashes of documents would need all of them to be read; so duplicates may stand on both sides, and files that are
sorted hold out another kind of text than they train on.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf.paths import expanded
from conf.train_settings import DataConfig
from model.problems import BadInput
from train.data import corpus
from train.data import tokenizer as tokenizers_
from train.data.formats.blocks import RemoteTokenFile
from train.data.formats.remote import RemotePath
from train.data.formats.token_files import Tokens, read_token_files
from train.data.packing import FileTokens, TokenFile
from train.data.shards import SPLITS
from train.data.tally import Tally
from train.data.tokenizer_cache import PreparedTokenizer

PARTS = "parts.json"
"""Which part of which file belongs to which split."""
_MAX_NAMED = 3


def describe_tokens(data: DataConfig, tokenizer: PreparedTokenizer, folder: Path) -> dict[str, Any]:
    """Look at the token files of a corpus and write down what they are, for `cache.cached`.

    Args:
        data: the corpus, of `Source.tokens`.
        tokenizer: that has made them, as the settings say.
        folder: to write to.

    Raises:
        BadInput: there are none, their indexes do not fit, or others have made them.
    """
    listed = corpus.list_files(data)
    files, others = read_token_files(listed, data.token_dtype, f"data.path={data.path}")
    if not any(file.num_tokens for file in files):
        what = f"none of its {len(listed)} files has tokens in it" if listed else "no file is there"
        raise BadInput([f"data.path={data.path}: {what}; .bin with .idx, .ds, .npy or .bin files would work"])
    if problems := _other_tokenizer(data, files, tokenizer):
        raise BadInput(problems)
    known = [file.ends for file in files if file.ends is not None]
    documents = sum(map(len, known)) if len(known) == len(files) else None
    said = f"{len(files)} files, " + (
        f"{documents:,} documents" if documents is not None else "whose documents are unknown"
    )
    skipped = f"; {len(others)} other files are not read ({_few(others)})" if others else ""
    print(f"corpus {data.path}: {sum(file.num_tokens for file in files):,} tokens in {said}{skipped}", file=sys.stderr)
    parts: dict[str, list[Any]] = {split: [] for split in SPLITS}
    ends: dict[str, list[NDArray[np.int64]]] = {split: [] for split in SPLITS}
    tokens = dict.fromkeys(SPLITS, 0)
    for file in files:
        cut = _cut(file, data.val_fraction)
        for split, begin, end in (("train", 0, cut), ("val", cut, file.num_tokens)):
            if file.ends is not None:
                within = file.ends[(file.ends > begin) & (file.ends <= end)]
                ends[split].append(within - begin + tokens[split])
            path = file.path
            where = [path.url, path.size, path.stamp] if isinstance(path, RemotePath) else str(path.absolute())
            offset = file.offset + begin * np.dtype(file.dtype).itemsize
            parts[split].append([where, file.dtype, offset, end - begin])
            tokens[split] += end - begin
    tokenizer.copy_to(folder)
    (folder / PARTS).write_text(json.dumps(parts), "utf-8")
    if documents is not None:
        for split in SPLITS:
            np.concatenate([np.empty(0, np.int64), *ends[split]]).tofile(folder / f"{split}.ends")
    return {
        "dtype": files[0].dtype,
        "eos_id": tokenizer.eos_id,
        "tokenizer_size": tokenizer.size,
        "tokens": tokens,
        "tally": Tally(documents=documents or 0).as_dict(),
    }


def is_given(folder: Path) -> bool:
    """Tell whether a prepared corpus is token files that lie elsewhere."""
    return (folder / PARTS).is_file()


def open_tokens(folder: Path, split: str, eos_id: int) -> FileTokens:
    """Open a split of token files that `describe_tokens` has looked at."""
    files: list[TokenFile] = []
    for path, dtype, offset, number in json.loads((folder / PARTS).read_text("utf-8"))[split]:
        if isinstance(path, str):
            files.append(TokenFile(path, dtype, number, offset))
        else:
            files.append(RemoteTokenFile(RemotePath(*path), dtype, number, offset, folder.parent / "remote"))
    return _IndexedTokens(files, given_ends(folder, split), eos_id)


def given_ends(folder: Path, split: str) -> NDArray[np.int64] | None:
    """Return where the documents of a split end, ascending, mapped into memory; None where that is not known."""
    file = folder / f"{split}.ends"
    if not file.is_file():
        return None
    return np.memmap(file, np.int64, "r") if file.stat().st_size else np.empty(0, np.int64)


class _IndexedTokens(FileTokens):
    """Token files with an index of their documents, some of which may not end in an end token."""

    def __init__(self, files: Sequence[TokenFile], ends: NDArray[np.int64] | None, eos_id: int):
        super().__init__(files, "with data.path as it was when the run was prepared, or prepared anew, it would work")
        self._document_ends, self._eos_id = ends, eos_id

    def starts(self, start: int, count: int) -> NDArray[np.int64] | None:
        """Return where documents begin among these tokens that no end token stands in front of."""
        if self._document_ends is None:
            return None
        first, last = np.searchsorted(self._document_ends, [start, start + count])
        begins = np.asarray(self._document_ends[first:last]) - start
        if start == 0:
            begins = np.append(0, begins)
        begins = begins[begins < count]
        before = self.read(max(0, start - 1), count - (start == 0))
        after_end = np.append(False, before == self._eos_id) if start == 0 else before == self._eos_id
        return begins[~after_end[begins]]


def _cut(file: Tokens, val_fraction: float) -> int:
    """Where the held-out end of a file begins: at a document's beginning, where those are known."""
    cut = file.num_tokens - round(file.num_tokens * val_fraction)
    if file.ends is None or not val_fraction:
        return cut
    at = int(np.searchsorted(file.ends, cut, "right")) - 1
    return int(file.ends[max(at, 0)]) if len(file.ends) else cut


def _other_tokenizer(data: DataConfig, files: Sequence[Tokens], tokenizer: PreparedTokenizer) -> list[str]:
    """Whether the names beside token files are of other tokenizers than the one given; said where that is not known."""
    names = sorted({file.tokenizer for file in files if file.tokenizer})
    if len(names) > 1:
        return [f"data.path={data.path}: made by {len(names)} tokenizers, {_few(names)}, as their .ds.metadata say; a "
                "source for the files of each tokenizer alone would work"]  # fmt: skip
    for name in names:
        if not tokenizers_.tokenizer_file(name).is_file():
            print(f"data.path={data.path}: made by {name}, as .ds.metadata says; data.tokenizer={data.tokenizer} is "
                  "taken to be the same", file=sys.stderr)  # fmt: skip
        elif vocabulary_hash(Path(name)) != vocabulary_hash(tokenizer.path):
            return [f"data.tokenizer={data.tokenizer}: {data.path} was made by {name}, which has another vocabulary; "
                    f"data.tokenizer={name} would work"]  # fmt: skip
    return []


def vocabulary_hash(path: Path) -> str:
    """Hash the tokens of a tokenizer with their ids."""
    vocabulary = tokenizers_.load_tokenizer(expanded(path)).get_vocab(with_added_tokens=True)
    return hashlib.blake2b(json.dumps(sorted(vocabulary.items())).encode(), digest_size=16).hexdigest()


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")
