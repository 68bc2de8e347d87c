"""The command `deepnarrow depth-study`: shapes of an equal cost are trained, timed, compared and reported."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from conf.schema import to_jsonable
from launch.depth.findings import costs, decode_context, findings
from launch.depth.outcomes import best_rates, outcomes_of
from launch.depth.pictures import draw
from launch.depth.plan import Plan, Setting, plan
from launch.depth.text import as_text, costs_as_text
from launch.depth.timing import Timed, times_of
from launch.trainings.train_all import Training, Trains, problems_of, train_all
from launch.trainings.wandb_of_study import Table, wandb_of_study
from launch.trainings.written import say_aside, write_results
from model.problems import BadInput
from train.data.sources import prepare_run
from train.like import take_over


def run(options: argparse.Namespace) -> int:
    """Run the command; its `plan` prints shapes, costs and pipelines and trains nothing."""
    overrides = take_over(options.overrides)
    if not options.plan:
        return study(overrides)
    planned = plan(overrides)
    found = costs(planned)
    print(costs_as_text(found))
    print("".join(f"{line}\n" for line in found["missing"]), end="")
    return 0


def study(
    overrides: Sequence[str],
    train: Trains = train_all,
    check: Callable[[Sequence[Training]], list[str]] = problems_of,
    time: Callable[..., Timed] = times_of,
) -> int:
    """Run everything of a study that has not been done yet; return the exit code.

    Each training is a run with its own folder and its own run in W&B. What is done is not trained again, and what was
    stopped goes on. The models are timed anew each time, after all have been trained.

    Args:
        overrides: of the command.
        train: trains runs and waits for them.
        check: finds what keeps runs from starting.
        time: times the models.

    Raises:
        BadInput: the study cannot work; it lists every problem, before anything is trained.
    """
    planned = plan(overrides)
    first = planned.first()
    any_rate = dict.fromkeys(planned.models, planned.lrs[0])  # it is not known which, and all are judged alike
    if problems := check([planned.training(one) for one in [*first, *planned.others(any_rate)]]):
        raise BadInput(problems)
    planned.keep_recipe()
    for line in planned.missing:
        say_aside(line)
    seeds = len(planned.settings.seeds)
    say_aside(
        f"{planned.folder}: {len(planned.models)} shapes, {len(planned.lrs)} rates with the first seed and the best of "
        f"them with {seeds - 1} more: {len(first) + (seeds - 1) * len(planned.models)} runs of {planned.tokens:,} "
        "tokens"
    )
    if (code := _trained(planned, first, train)) is not None:
        return code
    others = planned.others(best_rates(outcomes_of(planned, first)))
    if (code := _trained(planned, others, train)) is not None:
        return code
    return _report(planned, first, others, time)


def _report(planned: Plan, first: Sequence[Setting], others: Sequence[Setting], time: Callable[..., Timed]) -> int:
    train = planned.config.train
    context = decode_context(planned)
    times = time(planned.models, train.micro_batch, train.seq_len, planned.settings.decode_batch, context, say_aside)
    tokens = sum(data.num_train_tokens for data in prepare_run(planned.config).by_name.values())
    found = findings(planned, outcomes_of(planned, first), outcomes_of(planned, others), times, tokens)
    pictures = write_results(planned.folder, "depth", found, as_text, draw)
    config = {"depth": to_jsonable(asdict(planned.settings)), **to_jsonable(asdict(planned.config))}
    summary = {key: found[key] for key in ("orderings", "claims", "notes")}
    wandb_of_study(planned.config.wandb, planned.folder, config, _tables(found), pictures, summary)
    return 0


def _trained(planned: Plan, settings: Sequence[Setting], train: Trains) -> int | None:
    return train([planned.training(one) for one in settings], at_once=planned.settings.parallel_runs)


def _tables(found: dict[str, Any]) -> dict[str, Table]:
    def table(rows: list[dict[str, Any]], without: str) -> Table:
        columns = [key for key in rows[0] if key != without]
        return columns, [[row[key] for key in columns] for row in rows]

    return {
        "shapes": table(found["shapes"], without="losses"),
        "models": table(found["models"], without="pipelines"),
        "runs": table(found["runs"], without=""),
    }
