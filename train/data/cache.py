"""Prepared corpora on disk: each whole or absent, built once however many processes ask."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.files import sync

META = "meta.json"
_SMALL = 1 << 24
"""Bytes of a file that is compared with its checksum whenever it is opened."""


def fingerprint(description: dict[str, Any]) -> str:
    """Hash a JSON-able description, as 32 hexadecimal digits."""
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode("utf-8"), digest_size=16).hexdigest()


def cached(folder: Path, build: Callable[[Path], dict[str, Any]], *, verify: bool = False) -> dict[str, Any]:
    """Return the meta data of a cache folder, which is built if it is not there or damaged.

    The folder is built under another name beside it and renamed when all is on disk, so that an interruption leaves
    nothing or everything. Of several processes that call this at once, one builds while the others wait on a lock
    that ends with its holder; what dead builders left is removed by the next.

    Each file has a checksum, made when it is built. Small files are compared with theirs each time, large ones where
    the time of their last change is another than it was.

    Args:
        folder: the cache folder; its parent is created.
        build: writes files into the folder that it is given and returns JSON-able meta data.
        verify: compare large files as well, whatever their times.

    Raises:
        Exception: whatever `build` raises; nothing is kept then.
    """
    meta, _ = _read(folder, verify)
    if meta is not None:
        return meta

    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock_of(folder)):
        meta, damage = _read(folder)
        if meta is not None:
            return meta
        if folder.exists():
            warnings.warn(f"{folder} is damaged ({damage}) and is prepared again", RuntimeWarning, stacklevel=2)
            discarded = _temporary(folder)
            os.rename(folder, discarded)
            shutil.rmtree(discarded)
        _remove_leftovers(folder)
        temporary = _temporary(folder)
        temporary.mkdir()
        try:
            meta = build(temporary)
            meta["files"] = {file.name: _describe(file) for file in sorted(temporary.iterdir())}
            _write(temporary, meta)
            for file in (*temporary.iterdir(), temporary):
                sync(file)
            os.rename(temporary, folder)
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return meta


def sound(folder: Path) -> bool:
    """Tell whether a cache folder is there and is as it was written."""
    return _read(folder)[0] is not None


def _read(folder: Path, verify: bool = False) -> tuple[dict[str, Any] | None, str]:
    """The meta data, or None and what is wrong."""
    try:
        meta = json.loads((folder / META).read_text("utf-8"))
        if meta.pop("checksum") != fingerprint(meta):
            return None, f"{META} is not as it was written"
        touched = False
        for name, expected in meta["files"].items():
            found = (folder / name).stat()
            if found.st_size != expected["bytes"]:
                return None, f"{name} has {found.st_size} bytes instead of {expected['bytes']}"
            changed = found.st_ctime_ns != expected["changed"]
            if verify or changed or found.st_size <= _SMALL:
                if _checksum(folder / name) != expected["blake2b"]:
                    return None, f"{name} is not as it was written"
                expected["changed"], touched = found.st_ctime_ns, touched or changed
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{type(error).__name__}: {error}"
    if touched:  # a copy of a cache, say: compared once, and then known by its new times
        with contextlib.suppress(OSError):
            _write(folder, meta)
    return meta, ""


def _write(folder: Path, meta: dict[str, Any]) -> None:
    text = json.dumps({**meta, "checksum": fingerprint(meta)}, indent=1)
    written = folder / f"{META}.{secrets.token_hex(4)}"
    try:
        written.write_text(text, "utf-8")
        os.replace(written, folder / META)
    finally:
        written.unlink(missing_ok=True)


def _describe(file: Path) -> dict[str, Any]:
    """What a file is known by. The time is that of its last change of any kind, which nobody can set back."""
    return {"bytes": file.stat().st_size, "blake2b": _checksum(file), "changed": file.stat().st_ctime_ns}


def _checksum(file: Path) -> str:
    made = hashlib.blake2b(digest_size=32)
    with open(file, "rb") as opened:
        while block := opened.read(1 << 22):
            made.update(block)
    return made.hexdigest()


def _lock_of(folder: Path) -> str:
    return f"{folder}.lock"


def _temporary(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _remove_leftovers(folder: Path) -> None:
    """Remove what dead builders left of this folder, whose lock is held, and of others that nobody is building."""
    from filelock import FileLock, Timeout

    for leftover in sorted(folder.parent.glob("*.tmp-*")):
        owner = folder.with_name(leftover.name.split(".tmp-")[0])
        if owner == folder:
            shutil.rmtree(leftover, ignore_errors=True)
            continue
        try:
            with FileLock(_lock_of(owner), timeout=0):
                shutil.rmtree(leftover, ignore_errors=True)
        except (Timeout, OSError):
            continue
