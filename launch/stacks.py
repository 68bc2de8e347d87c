"""The stacks of ranks that do not move: Python's by faulthandler, native by py-spy, NCCL's by its flight recorder."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

import torch

from parallel.heartbeat import STACKS, Beat, stacks_of, state_of

WAIT = 3.0
"""Seconds in which ranks write their stacks."""
NATIVE = 8
"""Ranks at most whose native stacks are taken; each takes py-spy a second or two."""
WANTED = "stacks-wanted"
"""The file by which `collect` asks for the stacks of ranks on other hosts; whoever mirrors their heartbeats passes it
on, and what comes is mirrored as well."""
_NONE = (0, 0)
_PIPE, _DUMP = "nccl-", "flight-recorder-rank-"
STALLS = "stalls"
"""The folder of a run in which stacks are kept."""


def record_flights(environment: MutableMapping[str, str], folder: Path, stalls: Path) -> None:
    """Have NCCL keep a record of its last operations, and write it when `collect` asks or a collective times out.

    Whoever starts the ranks of a host calls it there: a rank ends where it cannot make its pipe. Without a GPU there is
    nothing to record.

    Args:
        environment: of the ranks of this host; what it sets already stays.
        folder: of this host's heartbeats, where the pipes are over which ranks are asked.
        stalls: where the dumps go, one for each rank, for PyTorch's analyzer (`torchfrtrace`).
    """
    if not torch.cuda.is_available():
        return
    environment.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    environment.setdefault("TORCH_NCCL_DEBUG_INFO_PIPE_FILE", str(folder / _PIPE))
    for name in ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_FR_DUMP_TEMP_FILE"):  # its name before 2.9, and since
        environment.setdefault(name, str(stalls / _DUMP))


def collect(
    beats: Mapping[int, Beat | None], folder: Path, culprits: Iterable[int], stalls: Path, native: int = NATIVE
) -> dict[int, str]:
    """Collect the stacks of the ranks of this host, by rank; of the culprits first native ones, where py-spy is.

    Args:
        beats: by which their processes are known.
        folder: of the heartbeats.
        culprits: the ranks to look at first.
        stalls: where NCCL's dumps go, see `record_flights`; they are waited for. It is made where the run's folder is.
        native: ranks at most whose native stacks are taken.
    """
    with suppress(OSError):
        stalls.mkdir(exist_ok=True)
    dumps = {}
    here = {rank: beat for rank, beat in beats.items() if beat and not state_of(folder, rank).exists()}
    if len(here) < len(beats):
        (folder / WANTED).touch()
    for rank, beat in beats.items():
        if beat is not None and rank in here:
            with suppress(OSError):
                os.kill(beat.pid, STACKS)
            with suppress(OSError):
                pipe = os.open(folder / f"{_PIPE}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
                dump = stalls / f"{_DUMP}{rank}"
                dumps[dump] = _stamp(dump)
                os.write(pipe, b"1")
                os.close(pipe)
    files = {rank: stacks_of(folder, rank) for rank in beats}
    _settle(dict.fromkeys(files.values(), _NONE), WAIT if len(here) == len(beats) else 3 * WAIT)
    found = {rank: _text(path) or "no stack: the process does not answer\n" for rank, path in files.items()}
    first = dict.fromkeys(rank for rank in (*culprits, *beats) if rank in here)
    for rank, stack in _native({rank: here[rank].pid for rank in [*first][:native]}).items():
        found[rank] += stack
    _settle(dumps, WAIT)  # NCCL looks at its pipe once a second
    return found


def innermost(stacks: str, frames: int = 8) -> list[str]:
    """Pick the innermost frames of a rank's main thread, a line each.

    Args:
        stacks: of faulthandler, which names that thread the current one; it is the one that gets signals.
        frames: at most so many.
    """
    _, _, own = stacks.partition("Current thread")
    lines = [line for line in own.partition("\n\n")[0].splitlines()[1:] if line.startswith("  File ")]
    return [re.sub(r'^ +File "(.*)", line (\d+)', r"\1:\2", line) for line in lines[:frames]]


def _settle(files: Mapping[Path, tuple[int, int]], seconds: float) -> None:
    """Wait until all files have something else than before, and no more comes, for so many seconds at most.

    Args:
        files: with the `_stamp` of what was there before.
        seconds: to wait.
    """
    last: list[tuple[int, int]] = []
    end = time.monotonic() + seconds
    while files and time.monotonic() < end:
        now = [_stamp(path) for path in files]
        if now == last and all(one[0] and one != before for one, before in zip(now, files.values(), strict=True)):
            return
        last = now
        time.sleep(0.1)


def _stamp(path: Path) -> tuple[int, int]:
    """Return the size of a file and when it was written."""
    try:
        found = path.stat()
    except OSError:
        return _NONE
    return found.st_size, found.st_mtime_ns


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _native(pids: Mapping[int, int]) -> dict[int, str]:
    """Have py-spy say where processes are, native frames included; nothing where it is not installed."""
    spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if spy is None:
        return {}
    found = {}
    for rank, pid in pids.items():
        try:
            said = subprocess.run(
                [spy, "dump", "--native", "--pid", str(pid)], capture_output=True, text=True, timeout=20
            )
            text = said.stdout or said.stderr
        except subprocess.TimeoutExpired:
            text = "it did not answer within 20 s"
        found[rank] = f"\npy-spy dump --native --pid {pid}:\n{text}"
    return found
