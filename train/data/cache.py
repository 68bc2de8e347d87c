"""Prepared corpora on disk: each whole or absent, built once however many processes ask."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from train.files import sync

META = "meta.json"
_SMALL = 1 << 24
"""Bytes of a folder's first files, which are compared with their checksums whenever it is opened."""
_FEW = 64
"""Files that are looked at one after another."""


def fingerprint(description: dict[str, Any]) -> str:
    """Hash a JSON-able description, as 32 hexadecimal digits."""
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode("utf-8"), digest_size=16).hexdigest()


def cached(folder: Path, build: Callable[[Path], dict[str, Any]], *, verify: bool = False) -> dict[str, Any]:
    """Return the meta data of a cache folder, which is built if it is not there or damaged.

    The folder is built under another name beside it and renamed when all is on disk, so that an interruption leaves
    nothing or everything. Of several processes that call this at once, one builds while the others wait on a lock
    that ends with its holder; what dead builders left is removed by the next.

    Each file has a checksum, made when it is built. The first files, as far as they are small together, are compared
    with theirs each time, the others where the time of their last change is another than it was.

    Args:
        folder: the cache folder; its parent is created.
        build: writes files into the folder that it is given and returns JSON-able meta data.
        verify: compare large files as well, whatever their times.

    Raises:
        Exception: whatever `build` raises; nothing is kept then.
    """
    meta, _ = read(folder, verify)
    if meta is not None:
        return meta

    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as alone:
        meta, damage = read(folder)
        if meta is not None:
            return meta
        if folder.exists():
            warnings.warn(f"{folder} is damaged ({damage}) and is prepared again", RuntimeWarning, stacklevel=2)
            discarded = _temporary(folder)
            os.rename(folder, discarded)
            shutil.rmtree(discarded)
        if alone:
            _remove_leftovers(folder)
        temporary = _temporary(folder)
        temporary.mkdir()
        try:
            meta = build(temporary)
            meta["files"] = {file.name: describe(file) for file in sorted(temporary.iterdir())}
            write_json(temporary / META, meta)
            for file in (*temporary.iterdir(), temporary):
                sync(file)
            try:
                os.rename(temporary, folder)
            except OSError:  # where there are no locks, another may have built the same meanwhile
                other = read(folder)[0]
                if other is None:
                    raise
                shutil.rmtree(temporary)
                return other
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return meta


def sound(folder: Path) -> bool:
    """Tell whether a cache folder is there and is as it was written."""
    return read(folder)[0] is not None


def read(folder: Path, verify: bool = False) -> tuple[dict[str, Any] | None, str]:
    """Return the meta data of a cache folder, or None and what is wrong with it.

    Args:
        folder: the cache folder.
        verify: compare large files with their checksums as well, whatever their times.
    """
    try:
        meta = read_json(folder / META)
        touched, small = False, 0
        files = meta["files"]
        with ThreadPoolExecutor(16 if len(files) > _FEW else 1) as threads:  # a network disk takes its time for each
            stats = list(threads.map(lambda name: (folder / name).stat(), files))
        for (name, expected), found in zip(files.items(), stats, strict=True):
            if found.st_size != expected["bytes"]:
                return None, f"{name} has {found.st_size} bytes instead of {expected['bytes']}"
            changed = found.st_ctime_ns != expected["changed"]
            small += found.st_size
            if verify or changed or small <= _SMALL:
                if checksum(folder / name) != expected["blake2b"]:
                    return None, f"{name} is not as it was written"
                expected["changed"], touched = found.st_ctime_ns, touched or changed
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{type(error).__name__}: {error}"
    if touched:  # a copy of a cache, say: compared once, and then known by its new times
        with contextlib.suppress(OSError):
            write_json(folder / META, meta)
    return meta, ""


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file with a checksum of its own, durable and whole or not at all."""
    text = json.dumps({**content, "checksum": fingerprint(content)}, indent=1)
    written = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    try:
        written.write_text(text, "utf-8")
        sync(written)
        os.replace(written, file)
    finally:
        written.unlink(missing_ok=True)


def read_json(file: Path) -> dict[str, Any]:
    """Read a file of `write_json`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not as it was written.
    """
    content = json.loads(file.read_text("utf-8"))
    if not isinstance(content, dict) or content.pop("checksum", None) != fingerprint(content):
        raise ValueError(f"{file.name} is not as it was written")
    return content


def describe(file: Path) -> dict[str, Any]:
    """Return what a file is known by: size, checksum, and the time of its last change of any kind."""
    return {"bytes": file.stat().st_size, "blake2b": checksum(file), "changed": file.stat().st_ctime_ns}


def checksum(file: Path) -> str:
    """Hash a file, as 64 hexadecimal digits."""
    made = hashlib.blake2b(digest_size=32)
    with open(file, "rb") as opened:
        while block := opened.read(1 << 22):
            made.update(block)
    return made.hexdigest()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a cache folder, and tell whether there is one; without, several may build it at once."""
    from filelock import FileLock

    lock = FileLock(_lock_of(folder))
    with contextlib.suppress(NotImplementedError):  # of a file system that has no locks
        lock.acquire()
    try:
        yield lock.is_locked
    finally:
        lock.release()


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
        except (Timeout, OSError, NotImplementedError):
            continue
