"""The command `deepnarrow scaling`: try rates and batches, train a ladder of models, fit laws, and report them."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from conf.schema import to_jsonable
from launch.scaling.cost import cost_of
from launch.scaling.findings import findings
from launch.scaling.outcomes import outcomes_of
from launch.scaling.pictures import draw
from launch.scaling.plan import ISOFLOP, Laws, Plan, Setting, plan
from launch.scaling.rates import laws_of_grid
from launch.scaling.slurm import as_array
from launch.scaling.text import as_text
from launch.trainings.train_all import Training, Trains, problems_of, train_all
from launch.trainings.wandb_of_study import Table, wandb_of_study
from launch.trainings.written import say_aside, write_results
from model.problems import BadInput
from train.data.sources import prepare_run
from train.like import take_over
from train.records import is_over


def run(options: argparse.Namespace) -> int:
    """Run the command; its `print` writes a job array and trains nothing."""
    overrides = take_over(options.overrides)
    if options.print:
        return print_array(overrides, options.gpus_per_node)
    if options.gpus_per_node is not None:
        works = "with --print slurm it would"
        raise BadInput([f"--gpus-per-node={options.gpus_per_node}: says nothing of runs on this machine; {works}"])
    return study(overrides)


def study(
    overrides: Sequence[str],
    train: Trains = train_all,
    check: Callable[[Sequence[Training]], list[str]] = problems_of,
) -> int:
    """Run everything of a study that has not been done yet; return the exit code.

    Each training is a run with its own folder and its own run in W&B. What is done is not trained again, and what was
    stopped goes on.

    Args:
        overrides: of the command.
        train: trains runs and waits for them.
        check: finds what keeps runs from starting.

    Raises:
        BadInput: the study cannot work; it lists every problem, before anything is trained.
    """
    planned = plan(overrides)
    grid = planned.grid()
    tried = all(planned.training(one).is_done for one in grid)
    by = _laws(planned, grid) if tried else None
    isoflop = planned.isoflop(by)
    if problems := check([planned.training(one) for one in [*grid, *isoflop]]):
        raise BadInput(problems)
    planned.keep_recipe()
    say_aside(f"{planned.folder}: {cost_of(planned, [*grid, *isoflop])}")
    if not tried:
        say_aside(f"{len(grid)} runs of rates and batches")
        if (code := _trained(planned, grid, train)) is not None:
            return code
        by = _laws(planned, grid)
        isoflop = planned.isoflop(by)
    _say_unused(planned, isoflop)
    if by is not None and not all(planned.training(one).is_done for one in isoflop):
        say_aside(f"rate {by.lr}, batch {by.batch_tokens} tokens; {len(isoflop)} IsoFLOP runs with them")
    if (code := _trained(planned, isoflop, train)) is not None:
        return code
    return _report(planned, by, grid, isoflop)


def _report(planned: Plan, by: Laws | None, grid: Sequence[Setting], isoflop: Sequence[Setting]) -> int:
    data = prepare_run(planned.config)
    found = findings(planned, outcomes_of(planned, grid), outcomes_of(planned, isoflop), by, data)
    pictures = write_results(planned.folder, "scaling", found, as_text, draw)
    config = {"scaling": to_jsonable(asdict(planned.settings)), **to_jsonable(asdict(planned.config))}
    summary = {key: found[key] for key in ("rates", "allocation", "further", "notes")}
    wandb_of_study(planned.config.wandb, planned.folder, config, _tables(found), pictures, summary)
    return 0


def print_array(overrides: Sequence[str], gpus_per_node: int | None) -> int:
    """Print the runs that can be trained next as a job array: the grid's first, by whose laws the others are trained.

    Raises:
        BadInput: the study cannot work.
    """
    planned = plan(overrides)
    grid = planned.grid()
    left = _left(planned, grid)
    again = "The same command with --print then prints the runs that are trained by what these find."
    if not left:
        isoflop = planned.isoflop(_laws(planned, grid))
        _say_unused(planned, isoflop)
        left = _left(planned, isoflop)
        again = "The same command without --print then fits the laws to all runs, and trains nothing."
    if not left:
        say_aside(f"{planned.folder}: all runs are done; the same command without --print fits the laws to them")
        return 0
    planned.keep_recipe()
    script, said = as_array(planned.folder.name, left, gpus_per_node, again)
    print(script, end="")
    for sentence in said:
        say_aside(sentence)
    say_aside(f"{len(left)} runs are printed; `deepnarrow prepare` with the same data.… prepares their data ahead")
    return 0


def _left(planned: Plan, settings: Sequence[Any]) -> list[Training]:
    trainings = [planned.training(one) for one in settings]
    return [training for training in trainings if not training.is_done]


def _laws(planned: Plan, grid: Sequence[Setting]) -> Laws | None:
    return laws_of_grid(outcomes_of(planned, grid)) if planned.settings.rate_budgets else None


def _trained(planned: Plan, settings: Sequence[Any], train: Trains) -> int | None:
    return train([planned.training(one) for one in settings], at_once=planned.settings.parallel_runs)


def _tables(found: dict[str, Any]) -> dict[str, Table]:
    columns = list(found["runs"][0])
    curves = found["allocation"]["curves"]
    return {
        "runs": (columns, [[run[key] for key in columns] for run in found["runs"]]),
        "isoflop_minima": (list(curves[0]), [list(curve.values()) for curve in curves]) if curves else ((), ()),
    }


def _say_unused(planned: Plan, isoflop: Sequence[Setting]) -> None:
    """Say how many finished IsoFLOP runs of the folder are not of the study, as after its grid has moved the laws."""
    folder = planned.folder / ISOFLOP
    wanted = {one.name for one in isoflop}
    unused = [path for path in folder.glob("*") if path.name not in wanted and is_over(path)]
    if unused:
        what = "run there is" if len(unused) == 1 else "runs there are"
        say_aside(
            f"{folder}: {len(unused)} finished {what} of another compute, model, rate, batch or seed, and not used"
        )
