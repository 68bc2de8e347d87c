"""What there is to find out on a machine with a GPU, in one go and one file: `./launch/gpu [FILE]`.

The tests marked `gpu`, the benchmark, and a run of some layers of the 7B from corpus to checkpoint with its metrics.
Each part is a process with a limit, so that one that hangs or fails costs its own part alone.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from launch.bench.suite import facts, write
from train.records import METRICS

ROOT = Path(__file__).resolve().parent.parent
RUN = [
    # A slice that an 80 GB card trains with room to spare, at the 7B's width and length.
    *["model=7b", "model.n_layers=6", "model.vocab_size=32768", "train.global_batch=8", "train.micro_batch=1"],
    *["data=stdlib", "schedule.warmup_steps=10", "train.max_steps=20", "train.val_every=10", "train.val_sequences=8"],
    *["train.log_every=1", "sample.tokens=16", "wandb.mode=disabled"],
]
LIMITS = {"tests": 180.0, "bench": 300.0, "run": 150.0}
"""Seconds that each part may take; together they fit ten minutes and a half. On an H200 the tests take 90 s."""


def main(arguments: Sequence[str]) -> int:
    """Run the parts one after another; 0 if all ended well.

    Args:
        arguments: the file to write (gpu.json without one), then overrides of the run.
    """
    out = Path(arguments[0]) if arguments else Path("gpu.json")
    found: dict[str, Any] = facts()
    del found["subjects"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {
            "tests": (tests_command(folder / "tests.xml"), _tests),
            "bench": ([sys.executable, "-m", "launch.cli", "bench", "--out", str(folder / "bench.json")], _bench),
            "run": (
                [sys.executable, "train/pretrain.py", *RUN, *arguments[1:], f"hydra.run.dir={folder / 'run'}"],
                _run,
            ),
        }
        for part, (command, read) in parts.items():
            begin = time.perf_counter()
            code = _code_of(command, LIMITS[part])
            shown = [word.replace(str(folder), "FOLDER") for word in command[1:]]
            found[part] = {"command": shown, "exit_code": code, "wall_seconds": time.perf_counter() - begin}
            found[part] |= read(folder)
            write(found, out)
            print(f"{part}: exit code {code} after {found[part]['wall_seconds']:.0f} s", flush=True)
    print(f"all of it: {out}")
    return int(any(found[part]["exit_code"] for part in parts))


def tests_command(report: Path) -> list[str]:
    """The command that runs the tests marked `gpu`.

    It names their files: others need packages that a machine without a network may lack. Several run at a time where
    pytest-xdist is there, since most of what they take is the host's.
    """
    sources = sorted((ROOT / "tests").rglob("test_*.py"))
    files = [str(path.relative_to(ROOT)) for path in sources if "mark.gpu" in path.read_text("utf-8")]
    at_once = ["-n", "4", "--dist", "loadfile"] if find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-m", "gpu", *files, *at_once, f"--junitxml={report}"]


def _code_of(command: Sequence[str], limit: float) -> int:
    """The exit code of a part; 124 for one that was ended at its limit."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return 124


def _tests(folder: Path) -> dict[str, Any]:
    """How many passed, which failed, and why others were skipped."""
    if not (folder / "tests.xml").exists():
        return {}
    cases = ElementTree.parse(folder / "tests.xml").iter("testcase")
    failed: list[dict[str, Any]] = []
    skipped: dict[str, int] = {}
    passed = 0
    for case in cases:
        if (problem := case.find("failure")) is not None or (problem := case.find("error")) is not None:
            failed.append({"test": f"{case.get('classname')}::{case.get('name')}", "said": problem.get("message", "")})
        elif (reason := case.find("skipped")) is not None:
            skipped[reason.get("message", "")] = skipped.get(reason.get("message", ""), 0) + 1
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": skipped}


def _bench(folder: Path) -> dict[str, Any]:
    """What the benchmark found of what it came to."""
    path = folder / "bench.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def _run(folder: Path) -> dict[str, Any]:
    """The records of all steps."""
    path = folder / "run" / METRICS
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {"records": [json.loads(line) for line in lines]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
