"""The command `deepnarrow check`: it starts the ranks of a layout for seconds and says which of them are slow."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

from conf.schema import Config
from conf.train_settings import Precision
from conf.validate import validate
from launch.check import calibrate
from launch.check import rank as rank_module
from launch.check.findings import Verdict, judge, table
from launch.check.measure import RankFindings, Request
from launch.cluster_file import save, save_problems
from launch.hostfile import slots_of
from launch.supervise import end_group, launcher_command, launcher_environment
from model.problems import BadInput
from parallel.processes import free_port, started_by_launcher
from parallel.sharding import kv_copies
from train.like import take_over
from train.preflight import this_machine
from train.strict_json import dumps
from train.uptrain import compose_with_source

_RUNNER = "import sys; sys.path[:] = filter(None, sys.path); from deepspeed.launcher.runner import main; main()"
"""DeepSpeed's launcher of several machines; not with ``-m``, as in `launch.supervise`."""
SLOW = 1
"""The exit code where something is slower than its like, or a rank has failed."""


def run(options: argparse.Namespace) -> int:
    """Check a cluster; print a table and what is slow in it.

    Under a launcher this process is one of the ranks. Otherwise it starts them: on this machine, or on those of a
    hostfile.

    Returns:
        0; 1 where something is slower than its like or a rank failed.

    Raises:
        BadInput: with every problem of settings, hostfile and file to write.
    """
    launched = started_by_launcher(os.environ)
    problems = save_problems(options.save)
    if not 0 < options.percent < 100:
        problems.append(f"--percent={options.percent:g}: is above 0 and below 100; 20 would work")
    slots = {}
    if options.hostfile is not None and launched:
        problems.append(
            f"--hostfile={options.hostfile}: a launcher has started this process; without the option it works"
        )
    elif options.hostfile is not None:
        try:
            slots = slots_of(options.hostfile)
        except BadInput as error:
            problems += error.problems
    try:
        request = request_of(options.overrides, slots)
    except BadInput as error:
        raise BadInput([*problems, *error.problems]) from None
    if problems:
        raise BadInput(problems)
    if launched:
        found = rank_module.of_all_ranks(request)
        if found is None:
            return 0
    else:
        found, code = _started(request, options.hostfile)
        if found is None:
            print("the ranks ended without telling what they found", file=sys.stderr)
            return code or SLOW
    return _report(found, options)


def request_of(overrides: Sequence[str], slots: dict[str, int]) -> Request:
    """Compose the layout to check, as a run with these overrides would have it.

    Args:
        overrides: of the run.
        slots: the processes of each host of a hostfile; empty for this machine, or where a launcher has started them.

    Raises:
        BadInput: with every problem.
    """
    composition, _, _ = compose_with_source(take_over(overrides), checked=False)
    machine = this_machine()
    if slots:
        # The GPUs of the other hosts are not seen from here; each rank says if it has none.
        machine = replace(machine, gpus=0, processes=sum(slots.values()), elsewhere=True)
    config: Config = composition.config
    layout, problems = validate(config, machine)
    if problems := composition.all_problems(problems):
        raise BadInput(problems)
    assert layout is not None
    asked = config.train.precision
    bf16 = None if asked is Precision.auto else asked is Precision.bf16
    return Request(layout, config.parallel.placement, kv_copies(config.model, layout.tp), bf16)


def _started(request: Request, hostfile: Path | None) -> tuple[list[RankFindings] | None, int]:
    """Start the ranks and wait for them; return what rank 0 tells of all (None where it does not), and an exit code."""
    script, arguments = Path(rank_module.__file__), [rank_module.encoded(request.as_json())]
    if hostfile is None:
        command = launcher_command(script, arguments, request.layout.world_size)
    else:
        where = ["-q", "--hostfile", str(hostfile), "--master_port", str(free_port()), "--no_local_rank"]
        command = [sys.executable, "-c", _RUNNER, *where, str(script), *arguments]
    lines = rank_module.Lines()
    with _ended_with_us(command) as process:
        assert process.stdout is not None
        others = [line for line in process.stdout if not lines.takes(line)]
        code = process.wait()
    told = lines.value()
    if told is None or code:  # else what launchers say of each process that they start and see end
        print("".join(others), end="", file=sys.stderr)
    return None if told is None else [RankFindings.from_json(one) for one in told], code


@contextmanager
def _ended_with_us(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a launcher in a process group of its own, which ends when this is left, by a signal too."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    process = subprocess.Popen(
        command,
        env=launcher_environment(),
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        end_group(process.pid)
        process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(found: Sequence[RankFindings], options: argparse.Namespace) -> int:
    """Print the findings, save what a plan needs of them, and return the exit code."""
    verdict = judge(found, options.percent)
    values = calibrate.links_of(found) | calibrate.slowest_of(found)
    if options.json:
        ranks: list[dict[str, Any]] = [asdict(one) for one in found]
        print(dumps({"ranks": ranks, **asdict(verdict), "cluster": values}, indent=2))
    else:
        print(table(found))
        print("\n".join(_said(verdict, options.percent)))
    if options.save is not None and values:
        save(options.save, values, f"deepnarrow check of {len(found)} ranks")
        print(f"{options.save}: {', '.join(values)}", file=sys.stderr)
    elif options.save is not None:
        print(f"{options.save}: not written, since one rank has no links", file=sys.stderr)
    return SLOW if verdict.odd else 0


def _said(verdict: Verdict, percent: float) -> Iterator[str]:
    yield from verdict.odd
    yield from verdict.shared
    if not verdict.odd:
        yield f"nothing is more than {percent:g} % slower than the median of its like"
    if verdict.alone:
        yield f"not compared, since there is only one: {'; '.join(verdict.alone)}"
