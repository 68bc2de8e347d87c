"""A shard on disk: the tokens of a unit of work, split, each document followed by the end token.

`shards/000000.train.bin` and `.val.bin` hold the tokens, in machine byte order; `.train.ends` and `.val.ends` hold
where each document ends, as the number of tokens of the file up to there, its end token included, int64; an empty file
is not there. `000000.json`, written last, says what all of them hold, and that the shard is done.
"""

import hashlib
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from train.data.cache import read_json, write_json
from train.data.tally import Tally

SPLITS = ("train", "val")
FOLDER = "shards"


@dataclass
class Extreme:
    """The documents with the smallest or largest hash of a shard: all with that hash, where duplicates are."""

    key: int
    """Their hash; beyond the range of hashes where there is no document."""
    split: str = "train"
    """The split that they are in."""
    documents: list[int] = field(default_factory=list)
    """Their numbers among the documents of that split."""

    def meet(self, key: int, better: bool, split: str, number: int) -> None:
        """Take a document in if its hash is the same, or alone if its hash is `better`."""
        if better:
            self.key, self.split, self.documents = key, split, []
        if key == self.key:
            self.documents.append(number)


@dataclass
class Record:
    """What a shard holds."""

    tokens: dict[str, int]
    """Tokens of each split, end tokens included."""
    documents: dict[str, int]
    """Documents of each split."""
    lowest: Extreme
    highest: Extreme
    tally: Tally
    moved: str | None = None
    """The split to which documents were moved that another had none of in the whole corpus; counts are those after."""

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Record":
        """Make one of what `as_dict` gave."""
        given = {key: value for key, value in content.items() if key != "files"}
        given["lowest"], given["highest"] = Extreme(**given["lowest"]), Extreme(**given["highest"])
        return cls(**{**given, "tally": Tally(**given["tally"])})

    def as_dict(self) -> dict[str, Any]:
        """Return it JSON-able."""
        return asdict(self)


def shard_name(index: int) -> str:
    """Name the shard of a unit."""
    return f"{index:06}"


def token_file(folder: Path, index: int, split: str) -> Path:
    """Name the file with a shard's tokens of `train` or `val`."""
    return folder / FOLDER / f"{shard_name(index)}.{split}.bin"


def ends_file(folder: Path, index: int, split: str) -> Path:
    """Name the file that says where a shard's documents of a split end."""
    return folder / FOLDER / f"{shard_name(index)}.{split}.ends"


def record_file(folder: Path, index: int) -> Path:
    """Name the file that is there when the shard is done."""
    return folder / FOLDER / f"{shard_name(index)}.json"


def read_record(folder: Path, index: int) -> tuple[Record, dict[str, Any]] | None:
    """Return what a finished shard holds, and its files with sizes and checksums; None if it is not done or damaged.

    Damage is looked for in the record and in the sizes of the files.
    """
    try:
        content = read_json(record_file(folder, index))
        for name, described in content["files"].items():
            if (folder / FOLDER / name).stat().st_size != described["bytes"]:
                return None
        return Record.of(content), content["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _File:
    """A file under a temporary name, with its checksum."""

    def __init__(self, path: Path):
        self.path = path
        self.temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        self._file: BinaryIO = open(self.temporary, "wb", buffering=1 << 20)  # noqa: SIM115
        self._sum, self.bytes = hashlib.blake2b(digest_size=32), 0

    def write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._sum.update(content)
        self.bytes += len(content)

    def close(self, keep: bool) -> dict[str, Any] | None:
        """Bring it to disk, so that it would survive a power failure, and to its place; None if there is nothing."""
        try:
            if keep and self.bytes:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self.temporary, self.path)
                return {"bytes": self.bytes, "blake2b": self._sum.hexdigest()}
            self.path.unlink(missing_ok=True) if keep else None
            return None
        finally:
            self._abandon()

    def _abandon(self) -> None:
        with suppress(OSError):  # a full disk, once more
            self._file.close()
        self.temporary.unlink(missing_ok=True)


class ShardWriter:
    """Writes a shard; nothing of it stays if the block that it is the context of fails.

    Args:
        folder: of the corpus, in which the folder of shards is.
        index: of the unit.
        dtype: the unsigned integer type of the tokens.
        eos_id: the token that follows each document.
    """

    def __init__(self, folder: Path, index: int, dtype: str, eos_id: int):
        self._folder, self._index = folder, index
        self._dtype = np.dtype(dtype)
        self._end = np.array([eos_id], dtype=self._dtype).tobytes()
        self._files = {split: _File(token_file(folder, index, split)) for split in SPLITS}
        self._ends: dict[str, list[int]] = {split: [] for split in SPLITS}
        self._tokens = dict.fromkeys(SPLITS, 0)

    def write(self, split: str, parts: Sequence[NDArray]) -> int:
        """Append a document to a split; return its number there.

        Args:
            split: `train` or `val`.
            parts: its ids, of the type of the shard, in arrays one after another.
        """
        file = self._files[split]
        for part in parts:
            file.write(part.tobytes())
        file.write(self._end)
        self._tokens[split] += sum(len(part) for part in parts) + 1
        self._ends[split].append(self._tokens[split])
        return len(self._ends[split]) - 1

    def finish(self, lowest: Extreme, highest: Extreme, tally: Tally, moved: str | None = None) -> Record:
        """Bring the shard to its place; the record comes last."""
        files = {}
        for split in SPLITS:
            ends = _File(ends_file(self._folder, self._index, split))
            try:
                ends.write(np.asarray(self._ends[split], dtype=np.int64).tobytes())
            except BaseException:
                ends.close(keep=False)
                raise
            for file in (self._files[split], ends):
                if described := file.close(keep=True):
                    files[file.path.name] = described
        documents = {split: len(self._ends[split]) for split in SPLITS}
        record = Record(dict(self._tokens), documents, lowest, highest, tally, moved)
        write_json(record_file(self._folder, self._index), {**record.as_dict(), "files": files})
        return record

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close(keep=False)


def move_documents(folder: Path, index: int, record: Record, extreme: Extreme, dtype: str) -> None:
    """Move documents of a shard to the other split, where the whole corpus has none.

    Whatever interrupts this leaves files of other sizes than their record says: a shard that is not done.
    """
    source, target = extreme.split, "val" if extreme.split == "train" else "train"
    tokens = np.fromfile(token_file(folder, index, source), dtype)
    ends = np.fromfile(ends_file(folder, index, source), np.int64)
    chosen = set(extreme.documents)
    with ShardWriter(folder, index, dtype, int(tokens[-1])) as shard:
        for number, document in enumerate(np.split(tokens, ends[:-1])):
            shard.write(target if number in chosen else source, [document[:-1]])
        shard.finish(record.lowest, record.highest, record.tally, moved=target)
