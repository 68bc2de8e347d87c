"""Token files that others have written: which files of a corpus they are, and what their headers and indexes say.

- Megatron-LM, Megatron-DeepSpeed, GPT-NeoX: `NAME.bin` beside `NAME.idx` (magic MMIDIDX, version 1), with the lengths
  of sequences and which of them are a document's.
- datatrove and nanotron: `NAME.ds`, uint16 or uint32, beside `NAME.ds.index` with the documents' ends (uint64) and, in
  newer versions, `NAME.ds.metadata` with the tokenizer's name, the bytes of a token and the number of tokens.
- `NAME.npy`, one dimension of integers, and `NAME.bin` of nothing but ids, whose type `data.token_dtype` has to say.

Little-endian, as all of these are written.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.problems import BadInput
from train.data.columns import CorpusPath

_MMAP, _LEGACY = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
_MMAP_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""Megatron's codes of types; 6 and 7 are floating point."""
_LLM_C = 20240520
"""The number that llm.c's files begin with, in a header of 256 integers."""
_SIDECARS = (".idx", ".ds.index", ".ds.metadata", ".ds.loss", ".npy.index")
DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")


@dataclass(frozen=True)
class Tokens:
    """The tokens of a file."""

    path: CorpusPath
    dtype: str
    num_tokens: int
    offset: int = 0
    """Bytes before the first token."""
    ends: NDArray[np.int64] | None = None
    """Where documents end, as tokens before it, ascending to `num_tokens`; None where that is not known."""
    tokenizer: str | None = None
    """The name of the tokenizer, where it stands beside the file."""


def read_token_files(
    files: Sequence[tuple[str, CorpusPath]], token_dtype: str | None, said: str
) -> tuple[list[Tokens], list[str]]:
    """Find the token files among the files of a corpus, and read their headers and indexes.

    Args:
        files: name and path of each.
        token_dtype: the type of the ids of plain `.bin` files.
        said: the setting that named them and its value, for messages.

    Returns:
        The token files in the order of their names, and the names of files that are none.

    Raises:
        BadInput: with all that is wrong with them.
    """
    by_name, found, others, problems = dict(files), list[Tokens](), list[str](), list[str]()
    for name, path in files:
        read = _reader(name, by_name, token_dtype)
        if read is None:
            if not name.endswith(_SIDECARS) or _without_tokens(name) not in by_name:
                others.append(name)
            continue
        try:
            found.append(read(path))
        except BadInput as error:
            problems += [each if each.startswith("data.") else f"{said}: {each}" for each in error.problems]
        except OSError as error:
            problems.append(f"{said}: {path} cannot be read ({error}); a readable file would work")
    if problems:
        raise BadInput(problems)
    return found, others


def companions_of(path: str) -> list[str]:
    """Name the files that may belong to a token file, or be it: those of Megatron's where no ending is given."""
    if path.endswith((".bin", ".idx")):
        return [path[:-4] + (".idx" if path.endswith(".bin") else ".bin")]
    if path.endswith(".ds"):
        return [f"{path}.index", f"{path}.metadata"]
    return [] if path.endswith(".npy") else [f"{path}.bin", f"{path}.idx"]


def _without_tokens(name: str) -> str:
    """The token file that a file with an index or the like belongs to."""
    return name[:-4] + ".bin" if name.endswith(".idx") else name.rpartition(".")[0]


def _reader(
    name: str, by_name: dict[str, CorpusPath], token_dtype: str | None
) -> Callable[[CorpusPath], Tokens] | None:
    if name.endswith(".bin"):
        index = by_name.get(f"{name[:-4]}.idx")
        if index is not None:
            return lambda path: _megatron(path, index)
        return lambda path: _plain(path, token_dtype)
    if name.endswith(".ds"):
        return lambda path: _datatrove(path, by_name.get(f"{name}.index"), by_name.get(f"{name}.metadata"))
    return _numpy if name.endswith(".npy") else None


def _megatron(path: CorpusPath, index: CorpusPath) -> Tokens:
    with index.open("rb") as file:
        magic = file.read(len(_MMAP))
        if magic[: len(_LEGACY)] == _LEGACY:
            raise BadInput([f"{index}: the format of Megatron-LM's cached and lazy datasets (TNTIDX), which is not "
                            "read; the corpus preprocessed with --dataset-impl mmap would work"])  # fmt: skip
        head = file.read(25)
        if magic != _MMAP or len(head) < 25:
            raise BadInput([f"{index}: no index of Megatron-LM's, which begins with MMIDIDX; the .idx that was written "
                            "with the .bin would work"])  # fmt: skip
        version, code, sequences, documents = struct.unpack("<QBQQ", head)
        if version != 1 or code not in _MMAP_DTYPES:
            what = f"version {version}" if version != 1 else f"type {code}, which is not one of token ids,"
            raise BadInput([f"{index}: {what} of Megatron-LM's index is not read; version 1 with integers would work"])
        expected = 34 + 12 * sequences + 8 * documents
        if index.stat().st_size < expected:
            raise BadInput([f"{index}: {index.stat().st_size:,} bytes and not the {expected:,} of {sequences:,} "
                            f"sequences and {documents:,} documents; the whole file would work"])  # fmt: skip
        lengths = np.frombuffer(file.read(4 * sequences), "<i4").astype(np.int64)
        pointers = np.frombuffer(file.read(8 * sequences), "<i8")
        of_documents = np.frombuffer(file.read(8 * documents), "<i8")
    dtype = np.dtype(_MMAP_DTYPES[code])
    upto = np.concatenate([[0], np.cumsum(lengths)])
    size, wanted = path.stat().st_size, int(upto[-1]) * dtype.itemsize
    if size != wanted or not np.array_equal(pointers, upto[:-1] * dtype.itemsize):
        how = f"has {size:,} bytes" if size != wanted else "has them elsewhere"
        raise BadInput([f"{index}: does not fit {path}: it says {upto[-1]:,} tokens of {dtype}, {wanted:,} bytes, and "
                        f"the file {how}; the two files of one preprocessing would work"])  # fmt: skip
    ends = None
    if documents:
        if of_documents.min() < 0 or of_documents.max() > sequences or (np.diff(of_documents) < 0).any():
            raise BadInput([f"{index}: its documents do not ascend among its {sequences:,} sequences; the .idx that "
                            "was written with the .bin would work"])  # fmt: skip
        ends = _ascending(upto[of_documents], int(upto[-1]))
    return Tokens(path, str(dtype), int(upto[-1]), ends=ends)


def _datatrove(path: CorpusPath, index: CorpusPath | None, metadata: CorpusPath | None) -> Tokens:
    size, itemsize, tokenizer, ends, said = path.stat().st_size, 0, None, None, None
    if metadata is not None:
        with metadata.open("rb") as file:
            lines = file.read().decode("utf-8", "replace").split("\n")
        name, _, width = lines[0].rpartition("|")
        if not width.isdigit() or int(width) not in (2, 4):
            raise BadInput([f"{metadata}: no metadata of datatrove's, whose first line ends in the bytes of a token, "
                            "2 or 4; the file that was written with the .ds would work"])  # fmt: skip
        itemsize, tokenizer = int(width), name
    if index is not None:
        with index.open("rb") as file:
            raw = file.read()
        ends = np.frombuffer(raw[: len(raw) // 8 * 8], "<u8").astype(np.int64)
        said = int(ends[-1]) if len(ends) else 0
    if not itemsize:  # older versions write no metadata: the bytes of a token follow from the index
        if not said or size % said or size // said not in (2, 4):
            what = (
                "there is neither"
                if index is None
                else f"by {index} there would be {said or 0:,} tokens in {size:,} bytes"
            )
            raise BadInput([f"{path}: the bytes of a token are not known, as {what}; the .ds.metadata or .ds.index "
                            "that was written with it would work"])  # fmt: skip
        itemsize = size // said
    if size % itemsize or (said is not None and said * itemsize != size):
        raise BadInput([f"{path}: {size:,} bytes, and not the {(said or 0) * itemsize:,} of {said or 0:,} tokens; the "
                        "file and the index that were written together would work"])  # fmt: skip
    number = size // itemsize
    ends = None if ends is None else _ascending(ends, number)
    return Tokens(path, "uint16" if itemsize == 2 else "uint32", number, ends=ends, tokenizer=tokenizer or None)


def _numpy(path: CorpusPath) -> Tokens:
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        except ValueError as error:
            raise BadInput(
                [f"{path}: no file of NumPy's ({error}); a file that np.save has written would work"]
            ) from error
        offset = file.tell()
    if len(shape) != 1 or dtype.kind not in "iu":
        raise BadInput([f"{path}: an array of {dtype} and {len(shape)} dimensions; token ids, integers of one "
                        "dimension, would work"])  # fmt: skip
    if path.stat().st_size != offset + shape[0] * dtype.itemsize:
        raise BadInput([f"{path}: {path.stat().st_size:,} bytes, and not the {offset + shape[0] * dtype.itemsize:,} of "
                        f"{shape[0]:,} tokens; the whole file would work"])  # fmt: skip
    return Tokens(path, dtype.str, int(shape[0]), offset)


def _plain(path: CorpusPath, token_dtype: str | None) -> Tokens:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = np.frombuffer(file.read(12).ljust(12, b"\0"), "<i4")
    if size >= 1024 and head[0] == _LLM_C:
        dtype, offset = np.dtype("uint16" if head[1] == 1 else "uint32"), 1024
    elif token_dtype is None:
        raise BadInput([f"data.token_dtype=null: {path} has neither an .idx beside it nor a header, and nothing says "
                        "what its ids are; data.token_dtype=uint16 or data.token_dtype=uint32 would work"])  # fmt: skip
    else:
        dtype, offset = np.dtype(token_dtype), 0
    number, rest = divmod(size - offset, dtype.itemsize)
    if rest or number < 0:
        raise BadInput([f"{path}: {size:,} bytes, which are no whole number of {dtype}; another data.token_dtype, or "
                        "the whole file, would work"])  # fmt: skip
    if offset and number != head[2]:
        raise BadInput([f"{path}: {number:,} tokens, and its header says {head[2]:,}; the whole file would work"])
    return Tokens(path, dtype.name, number, offset)


def _ascending(ends: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Ends of documents without those of empty ones, up to the last token."""
    ends = np.unique(np.append(ends, number))
    return ends[ends > 0]
