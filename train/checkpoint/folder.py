"""The folder of a run's checkpoints: how they are named, which are kept, which are deleted.

``step-00000400`` is whole: it was renamed to that when all of it was on disk. ``….tmp`` is being written or deleted, or
was when its process died. ``….damaged`` was whole once, and the weights of ``….diverged`` are worth nothing: neither is
resumed from. ``latest`` points at the newest.
"""

import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
LATEST = "latest"
_WHOLE = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"(step-\d{8,}|latest)\.tmp")


def name_of(step: int) -> str:
    """Name the checkpoint of a step, as ``step-00000400``."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Read the step from a checkpoint's name; None for what is no whole checkpoint."""
    match = _WHOLE.fullmatch(path.name)
    return int(match[1]) if match else None


def temporary(path: Path) -> Path:
    """Name the path that a checkpoint is written to before it has its own."""
    return path.with_name(path.name + ".tmp")


def newest_first(folder: Path) -> list[Path]:
    """List the whole checkpoints of a folder, sound or damaged since; none where there is no such folder."""
    with suppress(FileNotFoundError, NotADirectoryError):
        found = {path: step for path in folder.iterdir() if (step := step_of(path)) is not None and path.is_dir()}
        return sorted(found, key=lambda path: -found[path])
    return []


def below(path: Path) -> list[Path]:
    """List the whole checkpoints of a run folder or a folder of checkpoints, newest first."""
    return newest_first(path / CHECKPOINTS) or newest_first(path)


def point_at(path: Path) -> None:
    """Point the symbolic link ``latest`` at a checkpoint beside it; at no moment does it dangle."""
    link = path.with_name(LATEST)
    link.with_name(LATEST + ".tmp").unlink(missing_ok=True)
    link.with_name(LATEST + ".tmp").symlink_to(path.name)
    os.replace(link.with_name(LATEST + ".tmp"), link)


def clean(folder: Path) -> None:
    """Remove what a process that died had begun to write or to delete; no process may be writing there."""
    with suppress(OSError):
        for path in folder.iterdir():
            if _LEFTOVER.fullmatch(path.name):
                remove(path)


def prune(folder: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints and those of steps that `keep_every` divides."""
    for path in newest_first(folder)[keep_last:]:
        if not (keep_every and (step_of(path) or 0) % keep_every == 0):
            os.rename(path, temporary(path))  # half deleted, it must not look whole
            remove(temporary(path))


def remove(path: Path) -> None:
    """Delete a file or folder if that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def mark_damaged(path: Path, why: str = "damaged") -> Path:
    """Rename a checkpoint, to ``….damaged`` or so, so that it is not resumed from, and return its new path."""
    number, target = 1, path.with_name(f"{path.name}.{why}")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.{why}{number}")
    os.rename(path, target)
    with suppress(OSError):
        if rest := newest_first(path.parent):
            point_at(rest[0])
        else:
            path.with_name(LATEST).unlink(missing_ok=True)
    return target
