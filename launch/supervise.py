"""DeepSpeed's launcher, supervised: a process group of its own, signals passed on, no orphans, a true exit code.

Alone, the launcher leaves its ranks running when it is stopped by SIGTERM, SIGINT or SIGKILL, and can end with 0 after
a rank was killed.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Protocol

import psutil

from launch.stacks import STALLS, record_flights
from parallel.environment import name_accelerator
from parallel.heartbeat import FOLDER
from parallel.processes import SUPERVISOR, forget_launcher, free_port
from train.records import SUMMARY

if TYPE_CHECKING:
    from launch.persistence import Persistence

_LAUNCHER = "import sys; sys.path[:] = filter(None, sys.path); from deepspeed.launcher.launch import main; main()"
"""Not with ``-m``, which puts the working directory on the path before all else: a folder ``deepspeed`` or a file
``queue.py`` there would be imported in place of what has that name. (PYTHONSAFEPATH, of Python 3.11, keeps it off the
path of what the ranks start in turn.)"""
PRETRAIN = Path(__file__).resolve().parent.parent / "train" / "pretrain.py"
GRACE = 10.0
"""Seconds that what the launcher left running has to end by itself before it is killed."""
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def launch(
    arguments: Sequence[str], num_processes: int, run_dir: Path, persistence: "Persistence | None" = None
) -> int:
    """Start `train/pretrain.py` on this machine under DeepSpeed's launcher, and stay until all of it has ended.

    Args:
        arguments: of the script: Hydra overrides.
        num_processes: ranks to start.
        run_dir: of the run; its summary.json, written last, tells that the run ended as it should.
        persistence: what starts a run again that has failed; None starts it once.

    Returns:
        An exit code for the shell: 0 for a run that is complete, or was told to stop and is saved; 128 + N where signal
        N ended it at once; else that of the rank that failed.
    """
    with PassedOn() as signals:
        start = partial(start_once, num_processes=num_processes, run_dir=run_dir, signals=signals)
        return persistence.run(start, arguments, signals) if persistence else start(arguments)


def start_once(
    arguments: Sequence[str],
    num_processes: int,
    run_dir: Path,
    signals: "PassedOn",
    environment: Mapping[str, str] | None = None,
    look: Callable[[], bool] = lambda: False,
) -> int:
    """Start a run once; arguments and result are those of `launch`.

    Args:
        arguments, num_processes, run_dir: see `launch`.
        signals: that this process gets meanwhile.
        environment: of the ranks, besides that of this process.
        look: is called all the while, and tells whether all is to be ended at once.
    """
    completed_before = completion(run_dir)
    command = launcher_command(PRETRAIN, arguments, num_processes)
    of_ranks = {**launcher_environment(), **(environment or {})}
    if environment and FOLDER in environment:
        record_flights(of_ranks, Path(environment[FOLDER]), run_dir / STALLS)
    group = subprocess.Popen(command, env=of_ranks, start_new_session=True)
    signals.to(Group(group.pid))
    while group.poll() is None:
        if look():
            _signal_group(group.pid, signal.SIGKILL)
            group.wait()
        time.sleep(0.1)
    look()  # at who was the first to end, where that is not seen yet
    completed = completion(run_dir)  # by ranks that the launcher saw end; those that it left are stopped now
    end_group(group.pid)
    signals.to(None)

    code = group.returncode
    if signals.fatal is not None:
        return 128 + signals.fatal
    if signals.first is not None and code == 128 + signal.SIGTERM:  # SIGINT goes to the ranks by that name
        return 128 + signals.first
    if code == 0 and completed in (None, completed_before):
        print("the launcher ended without an error, but the run did not end as it should", file=sys.stderr)
        return 1
    return shell_code(code)


def shell_code(code: int) -> int:
    """Return the exit code for the shell of a launcher: 128 + N where a rank, or the launcher, was ended by signal N.

    The launcher hands a rank's death by signal N on as -N, which the system turns into 256 - N.
    """
    return 128 + (-code if code < 0 else 256 - code) if code < 0 or code > 192 else code


class PassedOn:
    """A context in which signals to this process are passed on to the ranks of a run.

    The first signal reaches the ranks alone, and they save and end: told as well, the launcher would kill them after
    30 s each. Where there are none yet, and for a second signal, everything is ended.

    Attributes:
        first: the first signal that there was.
        fatal: the one that has ended the run at once.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self.fatal: int | None = None
        self._ranks: Ranks | None = None

    def __enter__(self) -> "PassedOn":
        self._before = {number: signal.signal(number, self._pass_on) for number in PASSED_ON}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def to(self, ranks: "Ranks | None") -> None:
        """Pass signals on to these ranks from here on; None while there are none."""
        self._ranks = ranks
        if ranks is not None and self.fatal is not None:  # it came before there was anything to end
            ranks.kill()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        later, self.first = self.first is not None, self.first or number
        # Python would answer SIGINT with a traceback where it is not awaited yet.
        told = signal.SIGTERM if number == signal.SIGINT else number
        if self._ranks is not None and not later and number != signal.SIGQUIT and self._ranks.signal(told):
            with suppress(OSError):  # the terminal may be what is gone
                print("stopping after the step under way; a second signal stops at once", file=sys.stderr)
            return
        self.fatal = self.fatal or number
        if self._ranks is not None:
            self._ranks.kill()


class Ranks(Protocol):
    """What signals are passed on to."""

    def signal(self, number: int) -> bool:
        """Send a signal to all ranks; return whether there are any."""

    def kill(self) -> None:
        """End all at once."""


@dataclass(frozen=True)
class Group:
    """The ranks below a launcher on this machine.

    Attributes:
        launcher: its process, which leads a group of its own.
    """

    launcher: int

    def signal(self, number: int) -> bool:
        """Send a signal to all ranks; return whether there are any."""
        ranks = _ranks(self.launcher)
        for rank in ranks:
            with suppress(psutil.Error):
                rank.send_signal(number)
        return bool(ranks)

    def kill(self) -> None:
        """End all at once, the launcher with them."""
        _signal_group(self.launcher, signal.SIGKILL)


def launcher_command(script: Path, arguments: Sequence[str], num_processes: int) -> list[str]:
    """Write the command of DeepSpeed's launcher that starts a script as so many ranks on this machine.

    It is the part of the launcher that runs on each host, without the one that reads a hostfile.
    """
    return launcher_of_host(script, arguments, {"localhost": _devices(num_processes)}, 0, "127.0.0.1", free_port())


def launcher_of_host(
    script: Path,
    arguments: Sequence[str],
    devices: Mapping[str, Sequence[int | str]],
    node: int,
    address: str,
    port: int,
) -> list[str]:
    """Write the command of DeepSpeed's launcher on one of several hosts.

    Args:
        script, arguments: of the ranks.
        devices: of each host, a rank for each, in the order of the ranks.
        node: the index of this host.
        address, port: where the ranks meet.
    """
    world = base64.urlsafe_b64encode(json.dumps(devices).encode()).decode()
    return [
        *[sys.executable, "-c", _LAUNCHER, "-q", "--no_local_rank", f"--world_info={world}", f"--node_rank={node}"],
        *["--master_addr", address, "--master_port", str(port)],
        *[str(script), *arguments],
    ]


def launcher_environment() -> dict[str, str]:
    """Make the environment of the launcher, whose ranks end with this process."""
    environment = {**os.environ, SUPERVISOR: str(os.getpid()), "PYTHONSAFEPATH": "1"}
    forget_launcher(environment)
    name_accelerator(environment)
    return environment


def _devices(num_processes: int) -> list[int | str]:
    """Name the devices of the ranks, which the launcher shows them: those that this process may see."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return [*visible[:num_processes]] if len(visible) >= num_processes else [*range(num_processes)]


def completion(run_dir: Path) -> int | None:
    """Return when a run has last come to its end, by its disk's clock: summary.json is written last; None where never.

    Compared with that of before, it tells whether the run has come to its end since.
    """
    try:
        return (run_dir / SUMMARY).stat().st_mtime_ns
    except OSError:
        return None


def _ranks(launcher: int) -> list[psutil.Process]:
    """The processes below the launcher that run the script, which its own processes only name among their arguments."""
    found = []
    with suppress(psutil.Error):
        for process in psutil.Process(launcher).children(recursive=True):
            with suppress(psutil.Error):
                if str(PRETRAIN) in process.cmdline()[1:3]:
                    found.append(process)
    return found


def end_group(group: int) -> None:
    """Stop what the launcher left running."""
    if not _signal_group(group, signal.SIGTERM):
        return
    deadline = time.monotonic() + GRACE
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
