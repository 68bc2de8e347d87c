"""Files of W&B's offline runs: records in LevelDB's log format behind a header of 7 bytes.

W&B's client keeps no step for an offline run that goes on in another process, and its process can lose its last records
when it is killed; the file alone says which steps are there. Nobody promises its format: it is that of W&B's client
from 0.22 to `NEWEST`, and what another writes is refused by its header.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as proto

NEWEST = "0.31"
"""The newest minor version of W&B's client whose files have been read; `pyproject.toml` asks for none that is newer."""
_BLOCK, _HEADER = 32768, 7
_KNOWN = b":W&B\xe1\xbe\x00"
"""What a file begins with: two marks, and the version of the format."""
_FULL, _LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """Read the `Record`s of a .wandb file, up to where a killed process left it.

    Raises:
        ValueError: it begins as no file of a known version does.
    """
    data = path.read_bytes()
    if data[:_HEADER] != _KNOWN[: len(data)]:
        raise ValueError(
            f"{path} begins with {data[:_HEADER].hex()}, and W&B's files that can be read here with {_KNOWN.hex()}; "
            f"moving it away, and wandb {NEWEST} for what is to come, would work"
        )
    at, parts = _HEADER, []
    while at + _HEADER <= len(data):
        room = _BLOCK - at % _BLOCK
        if room < _HEADER:  # no record begins in the last bytes of a block
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        part = data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind == 0 or len(part) < length:
            return
        parts.append(part)
        if kind in (_FULL, _LAST):
            record = proto.Record()  # type: ignore[attr-defined]
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def last_offline_step(folder: Path, run_id: str) -> int | None:
    """Find the last step that any offline part of a run holds, -1 for none, and None where there is no such part.

    Args:
        folder: W&B's, of the run folder.
        run_id: of the W&B run.

    Raises:
        ValueError: one of its files is in a format that is not known.
    """
    files = list(folder.glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    found = (record for file in files for record in records(file))
    steps = [record.history.step.num for record in found if record.WhichOneof("record_type") == "history"]
    return max(steps, default=-1) if files else None
