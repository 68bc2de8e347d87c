"""Pretrain: ``deepspeed train/pretrain.py model=67b parallel.pp=12 ...``, every argument a Hydra override.

A launcher starts this file once per process. `deepnarrow train` is the friendlier way on one machine.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# Python puts the folder of a script first on the path: its files would hide packages of the same name, and the
# project's packages lie one above. Neither depends on whether the project is installed.
_ROOT = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    sys.path[0] = _ROOT

from conf.compose import quoted  # noqa: E402
from conf.job import run_as_job  # noqa: E402
from conf.schema import register  # noqa: E402
from model.problems import BadInput  # noqa: E402
from parallel.processes import SUPERVISOR, die_with, free_port  # noqa: E402
from train.stopping import StopSignals  # noqa: E402

if TYPE_CHECKING:
    from train.preflight import PreparedRun

SPEAK_AFTER = 30.0
"""Seconds after which a rank other than 0 says what is wrong: by then rank 0 has said it and the launcher has ended
all, unless it is wrong on this host alone."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as one rank; exits with 2 and one line per problem on impossible settings or data."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # DeepSpeed's launcher adds --local_rank=N, which Hydra does not know; LOCAL_RANK says the same.
    arguments = [argument for argument in arguments if not argument.startswith(("--local_rank", "--local-rank"))]
    register()
    if asks_hydra(arguments):
        if os.environ.get("RANK", "0") == "0":  # one answer, however many were started
            _answer(arguments)
        return

    stand_alone_unless_launched()
    die_with(os.environ.get(SUPERVISOR))
    rank = int(os.environ["RANK"])
    from train.preflight import locked, preflight

    options, overrides = hydra_options(arguments)
    try:
        prepared = preflight(
            overrides, config_name=options.config_name, config_dir=options.config_dir, writes=rank == 0
        )
        with StopSignals() as signals:
            from train.loop import train

            if rank != 0:  # the run folder, Hydra's files in it and the log are rank 0's to write
                train(prepared, signals)
            elif prepared.complete:
                print(prepared.complete, file=sys.stderr)
                train(prepared, signals)
            else:
                with locked(prepared.run_dir):
                    clear_run_dir(prepared)
                    run_as_job(prepared.composition, prepared.run_dir, lambda: train(prepared, signals))
    except BadInput as error:
        if rank != 0:
            time.sleep(SPEAK_AFTER)
        print("\n".join(error.problems), file=sys.stderr)
        raise SystemExit(2) from None


def clear_run_dir(prepared: "PreparedRun") -> None:
    """Clear the run folder of what this run does not go on from; only half-written checkpoints are deleted."""
    from train.checkpoint import folder
    from train.tracking import set_aside

    start = prepared.start
    folder.clean(prepared.run_dir / folder.CHECKPOINTS)
    if start.own and not start.rewind:
        return
    if earlier := set_aside(prepared.run_dir, after=folder.step_of(start.candidates[0]) if start.own else None):
        print(f"an earlier run in this folder was moved to {earlier}", file=sys.stderr)


def for_ranks(options: argparse.Namespace, overrides: Sequence[str], run_dir: Path) -> list[str]:
    """Write the arguments of the ranks of a run that is to be kept in `run_dir`.

    Each composes its configuration, would look up ${now:...} in hydra.run.dir again, and find another folder a second
    later. Nor may Hydra change the working directory: paths in the configuration are relative to where the run was
    started.
    """
    fixed = [f"hydra.run.dir={quoted(run_dir)}", "hydra.job.chdir=false"]
    extra = [f"--config-dir={options.config_dir}"] if options.config_dir else []
    # Options last: Hydra's parser takes the overrides on one side of them only.
    return [*overrides, *fixed, f"--config-name={options.config_name}", *extra]


def asks_hydra(arguments: Sequence[str]) -> bool:
    """Tell whether the arguments ask Hydra a question (--help, --cfg job, ...) instead of starting a run."""
    long = {"--help", "--hydra-help", "--version", "--cfg", "--info", "--shell-completion"}
    short = {"-h", "-c", "-i", "-sc"}
    return any(argument.partition("=")[0] in long | short for argument in arguments)


def hydra_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse Hydra's own options that decide what is composed, and the overrides."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-cn", "--config-name", default="config")
    parser.add_argument("-cd", "--config-dir")
    parser.add_argument("-r", "--run", action="store_true")
    options, rest = parser.parse_known_args(list(arguments))
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        named = ", ".join(unknown)
        print(f"{named}: not an option of a training run; for several runs, start several", file=sys.stderr)
        raise SystemExit(2)
    return options, rest


def _answer(arguments: Sequence[str]) -> None:
    """Let Hydra answer what it was asked."""
    import hydra

    sys.argv = [str(Path(_ROOT) / "train" / "pretrain.py"), *arguments]
    hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")(lambda node: None)()


def stand_alone_unless_launched() -> None:
    """Set the environment of a run of one process, where no launcher has."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


if __name__ == "__main__":
    main()
