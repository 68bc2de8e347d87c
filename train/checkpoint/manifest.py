"""The manifest of a checkpoint: what the checkpoint holds, and whether its files are intact.

A checkpoint is a folder of safetensors files, tokenizer.json and manifest.json. Neither JSON nor safetensors can hold
code, so that reading one, from wherever it comes, runs none.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.problems import BadInput
from train import strict_json

MANIFEST = "manifest.json"
FORMAT = 2
"""Raise it when the meaning of a checkpoint's files changes. A version that reads format 1 alone would count samples by
steps, which is wrong once batches change."""
READ = (1, 2)
"""Formats that are read; format 1 has no history."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        step: optimizer steps taken.
        adam_step: updates that Adam counts, fewer where steps were skipped for their gradients.
        tokens: trained on so far.
        data: fingerprint of the prepared corpus.
        config: all settings of the run, the model's shape among them.
        layout: dp, pp, tp and the stages that wrote it.
        code: the commit or version.
        written: when, ISO 8601 with time zone.
        origin: the checkpoint that the run was told to start from, None for a run from the beginning.
        tensors: per name its shape and its pieces: offset and shape in the whole, file, and key in that file.
        files: per file name its size in bytes and its SHA-256.
        history: of what the run has trained on, see `train.checkpoint.history`; None for weights that no
            run trained, and for checkpoints from before batches and mixtures could change within a run.
        format: version of this format.
    """

    step: int
    adam_step: int
    tokens: int
    data: str
    config: dict[str, Any]
    layout: dict[str, Any]
    code: str
    written: str
    origin: str | None
    tensors: dict[str, dict[str, Any]]
    files: dict[str, dict[str, Any]]
    history: dict[str, Any] | None = None
    format: int = FORMAT

    @property
    def num_bytes(self) -> int:
        """Size of the files that it lists."""
        return sum(entry["bytes"] for entry in self.files.values())

    @property
    def num_parameters(self) -> int:
        """Elements of the master weights."""
        return sum(math.prod(entry["shape"]) for name, entry in self.tensors.items() if "/" not in name)


class Damaged(Exception):
    """A checkpoint differs from its manifest; the message says where, in a few words."""


def write(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, durable when this returns."""
    body = json.loads(strict_json.dumps(asdict(manifest)))
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {"sha256": _digest(body), **body}.items()]
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint and check it against its own checksum; the files are not checked.

    Raises:
        Damaged: it is missing, unreadable or changed.
        BadInput: it is of another format.
    """
    try:
        body = json.loads((folder / MANIFEST).read_text("utf-8"))
        if body.pop("sha256") != _digest(body):
            raise Damaged(f"{MANIFEST} was changed")
        if body["format"] not in READ:
            reads = f"this version of deepnarrow reads formats {' and '.join(map(str, READ))}"
            raise BadInput(
                [f"{folder}: written in format {body['format']}, and {reads}; the version that wrote it would"]
            )
        manifest = Manifest(**body)
        pieces = [piece["file"] for entry in manifest.tensors.values() for piece in entry["pieces"]]
        outside = [name for name in (*manifest.files, *pieces) if not _inside(folder, name)]
        listed = {name for name, entry in manifest.files.items() if {"bytes", "sha256"} <= entry.keys()}
        unlisted = [name for name in (*manifest.files, *pieces) if name not in listed]
    except OSError as error:
        raise Damaged(f"{MANIFEST}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Damaged(f"{MANIFEST} is no manifest") from None
    if outside:
        raise Damaged(f"{MANIFEST} names files outside its folder: {outside[0]}")
    if unlisted:
        raise Damaged(f"{MANIFEST} names {unlisted[0]} without its size and checksum")
    return manifest


def check_files(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Compare files with the manifest, all of them or those named: size first, then checksum.

    Raises:
        Damaged: at the first that differs.
    """
    for name in manifest.files if names is None else names:
        entry = manifest.files[name]
        try:
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                raise Damaged(f"{name} has {size:,} bytes instead of {entry['bytes']:,}")
            if checksum(folder / name) != entry["sha256"]:
                raise Damaged(f"{name} was changed: its SHA-256 is another")
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from None


def checksum(path: Path) -> str:
    """Compute the SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _inside(folder: Path, name: str) -> bool:
    """Whether a name is of a file right in the folder, no link out of it among them."""
    if Path(name).name != name or name == "..":
        return False
    return (folder / name).resolve().parent == folder.resolve()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
