"""Durability of files."""

import os
from contextlib import suppress
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file durable (fsync), or the names in a folder, as far as its file system allows that for a folder."""
    unasked = (OSError,) if path.is_dir() else ()
    with suppress(*unasked):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
