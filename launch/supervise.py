"""DeepSpeed's launcher, supervised: a process group of its own, signals passed on, no orphans, a true exit code.

Alone, the launcher leaves its ranks running when it is stopped by SIGTERM, SIGINT or SIGKILL, and can end with 0 after
a rank was killed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from parallel.engine import name_accelerator
from train.pretrain import SUPERVISOR, free_port
from train.tracking import SUMMARY

ROOT = Path(__file__).resolve().parent.parent
GRACE = 30.0
"""Seconds that a stopped run has to end by itself before it is killed."""
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def launch(arguments: Sequence[str], num_processes: int, run_dir: Path) -> int:
    """Start `train/pretrain.py` on this machine under DeepSpeed's launcher and stay until all of it has ended.

    Args:
        arguments: of the script: Hydra overrides.
        num_processes: ranks to start.
        run_dir: of the run; its summary.json, written last, tells whether the run is complete.

    Returns:
        An exit code for the shell: 0 for a complete run; 128 + N where signal N ended it; else that of the rank that
        failed.
    """
    command = [
        *[sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--no_local_rank"],
        *["--num_gpus", str(num_processes), "--master_port", str(free_port())],
        # This machine only: a hostfile that lies around is for those who call the launcher themselves.
        *["--hostfile", os.devnull],
        *[str(ROOT / "train" / "pretrain.py"), *arguments],
    ]
    completed_before = _completion(run_dir)
    environment = {**os.environ, SUPERVISOR: str(os.getpid())}
    name_accelerator(environment)
    group = subprocess.Popen(command, env=environment, start_new_session=True)
    received = _wait_passing_signals_on(group)
    _end_group(group.pid)

    code = group.returncode
    if received is not None:
        return 128 + received
    if code == 0 and _completion(run_dir) == completed_before:
        print("the launcher ended without an error, but the run is not complete", file=sys.stderr)
        return 1
    # The launcher hands a rank's death by signal N on as -N, which the system turns into 256 - N.
    return 128 + (-code if code < 0 else 256 - code) if code < 0 or code > 192 else code


def _completion(run_dir: Path) -> int | None:
    try:
        return (run_dir / SUMMARY).stat().st_mtime_ns
    except OSError:
        return None


def _wait_passing_signals_on(group: subprocess.Popen[bytes]) -> int | None:
    """Wait for the launcher; the first signal received meanwhile, if any. A second one kills what is left."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # Ctrl-C reaches the group as SIGTERM: Python would answer SIGINT with a traceback from every process.
        gently = signal.SIGTERM if number == signal.SIGINT else number
        _signal_group(group.pid, gently if len(received) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        deadline = None
        while group.poll() is None:
            if received and deadline is None:
                deadline = time.monotonic() + GRACE
            if deadline is not None and time.monotonic() > deadline:
                _signal_group(group.pid, signal.SIGKILL)
            time.sleep(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return received[0] if received else None


def _end_group(group: int) -> None:
    """Stop what the launcher left running."""
    if not _signal_group(group, signal.SIGTERM):
        return
    deadline = time.monotonic() + GRACE / 3
    while time.monotonic() < deadline and _signal_group(group, 0):
        time.sleep(0.1)
    _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> bool:
    """Whether there was anything left to receive the signal."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
