"""Files that outlive the machine they were written on."""

import os
from contextlib import suppress
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file durable, or the names in a folder, as far as its file system lets one ask that of a folder."""
    unasked = (OSError,) if path.is_dir() else ()
    with suppress(*unasked):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
