"""The files of a run folder that a run writes line by line or at its end: read, cut off, and set aside."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.checkpoint.folder import CHECKPOINTS, newest_first, step_of
from train.started import STARTED

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
SKIPPED = "skipped.jsonl"
"""An object for each step whose update was skipped, with the samples of its batch (`train.spikes`)."""
SAMPLES = "samples.jsonl"
"""An object for each text that was drawn from the model: the step after which, the prompt, the prompt and the rest."""
TIMELINES, PROFILES = "timelines", "profiles"
"""Folders of `train.timeline` and `train.profiling`. They are named here, so that a folder is read without PyTorch."""


def is_over(run_dir: Path) -> bool:
    """Tell whether the run in this folder is complete or has diverged: there is nothing that it could go on with."""
    try:
        summary = json.loads((run_dir / SUMMARY).read_text("utf-8"))
        return bool(summary["complete"] or summary["diverged"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def diverged_before(run_dir: Path) -> str | None:
    """Read why the run that was in this folder has diverged; None where it has not."""
    try:
        summary = json.loads((run_dir / SUMMARY).read_text("utf-8"))
        return summary["reason"] if summary["diverged"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole records of a file; none where it cannot be read."""
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError, RecursionError):
                yield json.loads(line)


def cut(path: Path, last_step: int) -> Iterator[dict[str, Any]]:
    """Cut a file after the record of a step, partly written lines included, and yield the records up to there."""
    kept: list[bytes] = []
    beginning, whole = 0, True
    with suppress(FileNotFoundError), open(path, "rb") as lines:
        for line in lines:
            record = None
            with suppress(ValueError):
                record = json.loads(line)
            if isinstance(record, dict) and line.endswith(b"\n") and record.get("step", last_step + 1) <= last_step:
                kept.append(line)
                beginning += len(line) if whole else 0
                yield record
            else:
                whole = False
    if beginning == sum(map(len, kept)):
        with suppress(FileNotFoundError):
            os.truncate(path, beginning)  # takes no room, where a disk may be full
    else:
        unfinished = path.with_name(path.name + ".tmp")
        with open(unfinished, "wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)


def set_aside(run_dir: Path, after: int | None = None) -> Path | None:
    """Move what an earlier run left in this folder to ``earlier/N``, so that nothing already written is lost.

    Only what a run writes is moved, since a run folder may hold other things.

    Args:
        run_dir: the run folder.
        after: for a run that goes back to this step of the one before: what that was up to there stays, checkpoints and
            records (the latter are copied, and the run then drops those that follow).

    Returns:
        The folder moved to, or None where there was nothing to move.
    """
    newer = [path for path in newest_first(run_dir / CHECKPOINTS) if (step_of(path) or 0) > (after or 0)]
    if not (run_dir / METRICS).exists() and not newer:
        return None
    earlier = run_dir / "earlier"
    earlier.mkdir(exist_ok=True)
    taken = [int(path.name) for path in earlier.iterdir() if path.name.isdigit()]
    target = earlier / str(max(taken, default=0) + 1)
    target.mkdir()
    if after is None:
        moved = [METRICS, SKIPPED, SAMPLES, CHECKPOINTS, TIMELINES, PROFILES]
    else:
        moved = [f"{CHECKPOINTS}/{path.name}" for path in newer]
        (target / CHECKPOINTS).mkdir()
        for name in (METRICS, SKIPPED, SAMPLES):
            with suppress(FileNotFoundError):
                shutil.copyfile(run_dir / name, target / name)
    for name in (*moved, SUMMARY, STARTED, ".hydra", "pretrain.log", "wandb"):
        if (run_dir / name).exists():
            (run_dir / name).rename(target / name)
    return target
