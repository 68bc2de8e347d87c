"""Prepared corpora on disk: each whole or absent, built once however many processes ask."""

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


def fingerprint(description: dict[str, Any]) -> str:
    """Hash a JSON-able description, as 32 hexadecimal digits."""
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode("utf-8"), digest_size=16).hexdigest()


def cached(folder: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Return the meta data of a cache folder, which is built if it is not there or damaged.

    The folder is built under another name beside it and renamed when all is on disk, so that an interruption leaves
    nothing or everything. Of several processes that call this at once, one builds while the others wait on a lock
    that ends with its holder; what dead builders left is removed by the next.

    Args:
        folder: the cache folder; its parent is created.
        build: writes files into the folder that it is given and returns JSON-able meta data.

    Raises:
        Exception: whatever `build` raises; nothing is kept then.
    """
    meta, _ = _read(folder)
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
            meta["files"] = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
            (temporary / META).write_text(json.dumps(meta, indent=1), "utf-8")
            for file in (*temporary.iterdir(), temporary):
                sync(file)
            os.rename(temporary, folder)
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return meta


def _read(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The meta data, or None and what is wrong."""
    try:
        meta = json.loads((folder / META).read_text("utf-8"))
        for name, size in meta["files"].items():
            found = (folder / name).stat().st_size
            if found != size:
                return None, f"{name} has {found} bytes instead of {size}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{type(error).__name__}: {error}"
    return meta, ""


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
