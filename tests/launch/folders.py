"""Run folders made by hand, as runs leave them."""

import json
import math
import os
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from train.records import METRICS, SUMMARY
from train.started import LOCK, STARTED, boot
from train.strict_json import dumps_flagged

NOW = 1_800_000_000.0
"""The present of these folders."""
HERE = {"host": "here", "boot": boot(), "pid": 2**22 + 1, "restart": 0, "ended": None}
ELSEWHERE = {**HERE, "host": "node7", "boot": "another"}


def ago(seconds):
    return datetime.fromtimestamp(NOW - seconds, timezone.utc).isoformat(timespec="seconds")


def records(count, batch=1000, noise=0.0, seed=0, curve=lambda tokens: 2 + 4 * np.exp(-tokens / 4e5), **more):
    """The records of a run whose loss is a curve of the tokens before each step, with noise of a batch."""
    drawn = np.random.default_rng(seed).normal(scale=noise, size=count)
    return [
        {
            "step": step,
            "loss": float(curve((step - 1) * batch) + drawn[step - 1]),
            "grad_norm": 1.0,
            "lr": 1e-3,
            "tokens": step * batch,
            "seconds": 2.0,
            "tokens_per_second": batch / 2,
            **{key: value(step) if callable(value) else value for key, value in more.items()},
        }
        for step in range(1, count + 1)
    ]


def write_run(folder: Path, lines=(), started=None, summary=None, events=(), changed=10, checkpoints=None, config=None):
    """Make a run folder.

    Args:
        folder: its path, made with all above it.
        lines: records of its metrics.jsonl.
        started: what its note says besides that of `HERE`; None for no note.
        summary: of its summary.json; None for none.
        events: of its events.jsonl.
        changed: seconds ago of its records.
        checkpoints: seconds ago, by name.
        config: YAML of its settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".hydra").mkdir(exist_ok=True)
    (folder / LOCK).touch()
    if config is not None:
        (folder / ".hydra" / "config.yaml").write_text(config)
    if lines:
        (folder / METRICS).write_text("".join(dumps_flagged(one) + "\n" for one in lines))
        os.utime(folder / METRICS, (NOW - changed, NOW - changed))
    if started is not None:
        (folder / STARTED).write_text(json.dumps({**HERE, "time": ago(3600), **started}))
    if summary is not None:
        (folder / SUMMARY).write_text(json.dumps(summary))
        os.utime(folder / SUMMARY, (NOW - changed, NOW - changed))
    if events:
        (folder / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    for name, age in (checkpoints or {}).items():
        (folder / "checkpoints" / name).mkdir(parents=True)
        os.utime(folder / "checkpoints" / name, (NOW - age, NOW - age))
    return folder


OPEN = {"steps": 1000, "tokens": 1_000_000, "resumed": None}
"""What the note of a run says once it is open."""
NAN = math.nan
