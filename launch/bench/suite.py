"""The runner of one benchmark or all of them, and the file of their results."""

import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from launch import cluster_file
from launch.bench import ALL, CALIBRATES, SUBJECTS
from launch.bench.common import device_name
from model.problems import BadInput
from train.strict_json import dumps


def run(
    subject: str | None, overrides: Sequence[str], out: Path | None, as_json: bool, save: Path | None = None
) -> None:
    """Measure subjects and print each one's results as soon as it is done.

    Args:
        subject: one of `SUBJECTS`; None runs `ALL`.
        overrides: the overrides of that subject.
        out: the JSON file of the results, rewritten after each subject, so that an interruption loses none that are
            done. With None, a single subject writes no file, and all of them write bench.json.
        as_json: whether to print JSON instead: a subject's results, or those of all at the end, as in the file.
        save: the cluster file to write what was measured into; the subject is then `CALIBRATES`, named or not.

    Raises:
        BadInput: the subject is unknown or refuses its settings, there are overrides without a subject, or a file
            cannot be written.
    """
    if save is not None and subject != CALIBRATES and (subject is None or "=" in subject):
        subject, overrides = CALIBRATES, [*([subject] if subject else []), *overrides]
    problems = [
        *_subject_problems(subject, overrides),
        *_save_problems(subject, save),
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
    if save is not None:
        said = f"deepnarrow bench {CALIBRATES} on {found['device']}"
        replaced = cluster_file.save(save, found["values"], said, found["facts"])
        said = f"; replaced there: {', '.join(replaced)}" if replaced else ""
        print(f"{save}: {len(found['values'])} measured keys{said}", file=sys.stderr)


def facts() -> dict[str, Any]:
    """Return the conditions of the results: device, PyTorch, date, threads, load; ``subjects`` is still empty."""
    return {
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],  # on a busy machine, only ratios of measurements by turns are meaningful
        "subjects": {},
    }


def write(record: dict[str, Any], out: Path) -> None:
    """Write the record as JSON, atomically."""
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    draft.write_text(dumps(record, indent=2) + "\n", "utf-8")
    os.replace(draft, out)


def _subject_problems(subject: str | None, overrides: Sequence[str]) -> list[str]:
    if subject is None and overrides:
        return [f"{overrides[0]}: is only taken with a subject, as in: deepnarrow bench {ALL[0]} {overrides[0]}"]
    if subject is None or subject in SUBJECTS:
        return []
    if "=" in subject:
        return [f"{subject}: overrides are only taken with a subject, as in: deepnarrow bench {ALL[0]} {subject}"]
    return [f"{subject}: no such benchmark; one of {', '.join(SUBJECTS)}, or none for {', '.join(ALL)}, would work"]


def _save_problems(subject: str | None, save: Path | None) -> list[str]:
    if save is not None and subject in SUBJECTS and subject != CALIBRATES:
        return [f"--save={save}: {subject} measures no cluster; deepnarrow bench {CALIBRATES} --save {save} would work"]
    return cluster_file.save_problems(save)


def _out_problems(out: Path | None) -> list[str]:
    """Return why the file cannot be written, before minutes of measuring."""
    if out is None:
        return []
    if out.is_dir():
        return [f"--out={out}: is a folder; a file in it, such as {out / 'bench.json'}, would work"]
    if not os.access(out.absolute().parent, os.W_OK | os.X_OK):
        return [f"--out={out}: cannot be written; a file in a folder that can be written would work"]
    return []
