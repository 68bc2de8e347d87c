"""One benchmark or all of them, and the file of what they found."""

import os
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from launch.bench import ALL, SUBJECTS
from launch.bench.common import device_name
from model.problems import BadInput
from train.strict_json import dumps


def run(subject: str | None, overrides: Sequence[str], out: Path | None, as_json: bool) -> None:
    """Measure and print; each subject as soon as it is done.

    Args:
        subject: one of `SUBJECTS`; None runs `ALL`.
        overrides: of that subject.
        out: a JSON file for the findings, written anew after each subject, so that an interruption keeps what there
            is. None writes none of a subject, and bench.json of all.
        as_json: print the findings as JSON instead: a subject's own, or those of all at the end, as in the file.

    Raises:
        BadInput: an unknown subject, overrides without one, a file that cannot be written, or what a subject refuses.
    """
    problems = [
        *_subject_problems(subject),
        *_out_problems(out := out or (Path("bench.json") if not subject else None)),
    ]
    if problems:
        raise BadInput(problems)
    record = facts()
    for name in [subject] if subject else ALL:
        benchmark = import_module(f"launch.bench.{name}")
        begin = time.perf_counter()
        found = benchmark.measure(overrides)
        record["subjects"][name] = {"wall_seconds": time.perf_counter() - begin, **found}
        if out:
            write(record, out)
        if not as_json:
            print(f"{name}: " * (not subject) + benchmark.as_text(found) + "\n" * (not subject), flush=True)
    if as_json:
        print(dumps(found if subject else record, indent=2))


def facts() -> dict[str, Any]:
    """What findings are worth nothing without: device, PyTorch, date, threads, load; and no ``subjects`` yet."""
    return {
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],  # where others compute too, only what was taken by turns means anything
        "subjects": {},
    }


def write(record: dict[str, Any], out: Path) -> None:
    """The record as JSON, whole or not at all."""
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    draft.write_text(dumps(record, indent=2) + "\n", "utf-8")
    os.replace(draft, out)


def _subject_problems(subject: str | None) -> list[str]:
    if subject is None or subject in SUBJECTS:
        return []
    if "=" in subject:
        return [f"{subject}: overrides are only taken with a subject, as in: deepnarrow bench {ALL[0]} {subject}"]
    return [f"{subject}: no such benchmark; one of {', '.join(SUBJECTS)}, or none for {', '.join(ALL)}, would work"]


def _out_problems(out: Path | None) -> list[str]:
    """Whether a file can be written there, before minutes of measuring."""
    if out is None:
        return []
    if out.is_dir():
        return [f"--out={out}: is a folder; a file in it, such as {out / 'bench.json'}, would work"]
    if not os.access(out.absolute().parent, os.W_OK | os.X_OK):
        return [f"--out={out}: cannot be written; a file in a folder that can be written would work"]
    return []
