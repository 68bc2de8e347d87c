"""Pretrain: ``deepspeed train/pretrain.py model=67b parallel.pp=12 ...``, every argument a Hydra override.

A launcher starts this file once per process. `deepnarrow train` is the friendlier way on one machine.
"""

import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

# Python puts the folder of a script first on the path: its files would hide packages of the same name, and the
# project's packages lie one above. Neither depends on whether the project is installed.
_ROOT = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    if sys.path[0] == str(Path(__file__).resolve().parent):  # with PYTHONSAFEPATH it is not there
        del sys.path[0]
    sys.path.insert(0, _ROOT)

from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: E402
from hydra.errors import HydraException  # noqa: E402

from conf.compose import compose_overrides, quoted  # noqa: E402
from conf.job import run_as_job  # noqa: E402
from conf.schema import register  # noqa: E402
from conf.search import searched, split_options  # noqa: E402
from model.problems import BadInput  # noqa: E402
from parallel.heartbeat import FOLDER, heart  # noqa: E402
from parallel.processes import SUPERVISOR, die_with, free_port, read_launcher  # noqa: E402
from train.stopping import StopSignals  # noqa: E402

if TYPE_CHECKING:
    from parallel.rendezvous import Rendezvous
    from train.preflight import PreparedRun


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as one rank; exits with 2 and one line per problem on impossible settings or data.

    What one rank finds wrong, or fails with, ends all of them, on all hosts; each log says it once.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # DeepSpeed's launcher adds --local_rank=N, which Hydra does not know; LOCAL_RANK says the same.
    arguments = [argument for argument in arguments if not argument.startswith(("--local_rank", "--local-rank"))]
    register()
    if asks_hydra(arguments):
        if os.environ.get("RANK", "0") == "0":  # one answer, however many were started
            try:
                _answer(arguments)
            except BadInput as error:
                print("\n".join(error.problems), file=sys.stderr)
                raise SystemExit(2) from None
        return
    from parallel.rendezvous import RankLost, join

    try:
        stand_alone_unless_launched()
        die_with(os.environ.get(SUPERVISOR))
        heart.share(os.environ.get(FOLDER), int(os.environ["RANK"]))
        met = join()
    except (BadInput, RankLost) as error:
        if isinstance(error, RankLost):
            heart.fail(str(error), by_itself=False)
        print("\n".join(error.problems if isinstance(error, BadInput) else [str(error)]), file=sys.stderr)
        raise SystemExit(2 if isinstance(error, BadInput) else 1) from None
    with StopSignals(lambda code, why: met.fail(code, [why])) as signals:
        try:
            _run(arguments, met, signals)
        except BadInput as error:
            met.fail(2, error.problems)
            raise SystemExit(2) from None
        except RankLost as error:
            heart.fail(str(error), by_itself=False)
            met.fail(1, [str(error)])
            raise SystemExit(1) from None
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            heart.fail(reason)
            met.fail(1, [f"rank {met.rank} failed: {reason}"], said=True)
            raise
        finally:
            met.leave()


def _run(arguments: list[str], met: "Rendezvous", signals: StopSignals) -> None:
    """Run: rank 0 checks and prepares for all; then all train."""
    from train import hosts
    from train.like import take_over
    from train.preflight import PreparedRun, locked, preflight, preflight_here
    from train.started import noted

    held = ExitStack()

    def prepare() -> tuple[PreparedRun, list[str], hosts.SharedFacts | None]:
        try:
            prepared = preflight(take_over(arguments, goes_on=True))
        except BadInput as error:
            raise BadInput([*error.problems, *lost_quotes(arguments, os.environ)]) from None
        if not prepared.complete:
            held.enter_context(locked(prepared.run_dir))
            clear_run_dir(prepared)
            held.enter_context(noted(prepared.run_dir))
        others = met.size > 1 and not prepared.complete
        saves = prepared.config.checkpoint.enabled
        return prepared, arguments, hosts.of_rank_0(prepared.run_dir, saves) if others else None

    with held:
        prepared, of_rank_0, shared = met.share(prepare)
        if prepared.complete:
            if met.rank == 0:
                print(prepared.complete, file=sys.stderr)
            return
        from train.loop import train

        if met.rank == 0:  # the run folder, Hydra's files in it and the log are rank 0's to write
            run_as_job(prepared.composition, prepared.run_dir, lambda: train(prepared, signals, met))
            return
        if arguments != of_rank_0:
            raise BadInput([_other_arguments(arguments, of_rank_0)])
        assert shared is not None
        judges = os.environ.get("LOCAL_RANK", "0") == "0"
        if judges and (warning := hosts.clock_warning(shared, met.clock_ahead())):
            print(warning, file=sys.stderr)
        with met.busy():
            prepared = preflight_here(prepared, shared, judges=judges)
        train(prepared, signals, met)


def clear_run_dir(prepared: "PreparedRun") -> None:
    """Clear the run folder of what this run does not go on from; only half-written checkpoints are deleted."""
    from train.checkpoint import folder
    from train.records import set_aside

    start = prepared.start
    folder.clean(prepared.run_dir / folder.CHECKPOINTS)
    if start.own and not start.rewind:
        return
    if earlier := set_aside(prepared.run_dir, after=folder.step_of(start.candidates[0]) if start.own else None):
        print(f"an earlier run in this folder was moved to {earlier}", file=sys.stderr)


def for_ranks(arguments: Sequence[str], run_dir: Path) -> list[str]:
    """Write the arguments of the ranks of a run that is to be kept in `run_dir`.

    Rank 0 composes the configuration, would look up ${now:...} in hydra.run.dir again, and find another folder a second
    later. Nor may Hydra change the working directory: paths in the configuration are relative to where the run was
    started.
    """
    options, overrides = split_options(arguments)
    fixed = [f"hydra.run.dir={quoted(run_dir)}", "hydra.job.chdir=false"]
    # Options last: Hydra's parser takes the overrides on one side of them only.
    return [*overrides, *fixed, *options.arguments]


def goes_on(prepared: "PreparedRun") -> list[str]:
    """Write the overrides with which a run that has begun goes on from its own checkpoints, and not where it began."""
    begins = prepared.config.resume == "never" or prepared.start.rewind
    return ["resume=auto"] if begins else []


def lost_quotes(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Say how to type what Hydra cannot read, where a shell on each host has taken quotes away on its way here.

    DeepSpeed's launcher hands the arguments to several hosts by pdsh, and the shell there reads them once more.

    Args:
        arguments: overrides and options, as they have arrived.
        environment: of this rank.
    """
    if int(environment.get("CROSS_SIZE", "1")) < 2:
        return []
    found = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument.startswith("--"):
            continue
        try:
            OverridesParser.create().parse_override(argument)
        except HydraException:
            typed = shlex.quote(for_remote_shell(f"{key}={quoted(value)}" if equals else argument))
            found.append(
                f"{argument}: this is what has arrived; over pdsh a shell on each host reads an argument once more "
                f"and takes quotes, $ and \\ as its own; typed as {typed} it would arrive"
            )
    return found


def for_remote_shell(text: str) -> str:
    """Quote an argument of DeepSpeed's launcher so that it arrives on several hosts, whose shells read it once more.

    The launcher itself puts double quotes around what has a space, and a backslash before each in it.
    """
    inside = " " in text
    return re.sub(r"([\\$`])" if inside else r"([^\w@%+=:,./~-])", r"\\\1", text)


def _other_arguments(own: Sequence[str], of_rank_0: Sequence[str]) -> str:
    """Say how this rank was started otherwise than rank 0."""
    here = [argument for argument in own if argument not in of_rank_0] or ["fewer"]
    there = [argument for argument in of_rank_0 if argument not in own] or ["fewer"]
    return (
        f"{' '.join(here)}: on {socket.gethostname()}, and rank 0 was given {' '.join(there)}; the same arguments "
        "on all hosts would work (a shell on each may have read $ or `…` in them)"
    )


def asks_hydra(arguments: Sequence[str]) -> bool:
    """Tell whether the arguments ask Hydra a question (--help, --cfg job, ...) instead of starting a run."""
    long = {"--help", "--hydra-help", "--version", "--cfg", "--info", "--shell-completion"}
    short = {"-h", "-c", "-i", "-sc"}
    return any(argument.partition("=")[0] in long | short for argument in arguments)


def _answer(arguments: Sequence[str]) -> None:
    """Let Hydra answer what it was asked.

    Raises:
        BadInput: there is no such configuration to show.
    """
    import hydra
    from hydra._internal.utils import get_args_parser

    if any(argument.partition("=")[0] == "--like" for argument in arguments):
        from train.like import take_over

        arguments = take_over(arguments)
    options, rest = split_options(arguments, asks=True)
    sys.argv = [str(Path(_ROOT) / "train" / "pretrain.py"), *rest]
    asked = get_args_parser().parse_args(rest)
    if asked.cfg and (problems := compose_overrides([*asked.overrides, *options.arguments]).problems):
        raise BadInput(problems)
    with searched(options) as primary:
        hydra.main(version_base="1.3", config_path="pkg://conf", config_name=primary.name)(lambda node: None)()


def stand_alone_unless_launched() -> None:
    """Set the environment of a run of one process, where no launcher has started this one.

    Raises:
        BadInput: one has, and leaves out what has to be known.
    """
    if not read_launcher(os.environ):
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


if __name__ == "__main__":
    main()
