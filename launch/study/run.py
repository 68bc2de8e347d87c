"""The command `deepnarrow gqa-study`: pretrain, regroup, uptrain, measure, and report the results."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from conf.schema import to_jsonable
from launch.study.findings import FAILED, PARTS, as_text, findings, tables
from launch.study.long_range import problems_of as problems_of_rows
from launch.study.long_range import rows_of
from launch.study.part import Part
from launch.study.pictures import draw
from launch.study.plan import Plan, plan
from launch.study.results import Results, held_out_batches
from launch.study.settings import Section
from launch.study.training import KeptStarts, SectionTrainings
from launch.trainings.starts import Starts
from launch.trainings.train_all import problems_of
from launch.trainings.wandb_of_study import Table, wandb_of_study
from launch.trainings.written import say_aside, write_results
from model.problems import BadInput


def run(overrides: Sequence[str], starts: Starts | None = None, parts: Mapping[Section, Part] = PARTS) -> int:
    """Run everything of a study that has not been done yet; return the exit code.

    It is 1 where a section, or its text, tables or pictures, has failed; where it is told to stop, what `train_all`
    returns.

    Each training is a run with its own folder and its own run in W&B. A training that is complete is not repeated, and
    one that was stopped is resumed. Where a training or a measurement of a section fails, the others go on.

    Args:
        overrides: the overrides of the command.
        starts: what starts trainings; None forks them on a CPU, and starts commands on GPUs.
        parts: what sections are made of.

    Raises:
        BadInput: the study cannot work; it lists every problem, before anything is trained.
    """
    study = plan(overrides)
    with ExitStack() as held:
        if starts is None:
            kept = KeptStarts()
            held.callback(kept.close)
            starts = kept
        wanted = {section: parts[section].runs(study) for section in study.sections}
        trainings = SectionTrainings(study, wanted, say_aside, starts)
        _check(study, trainings)
        study.keep_recipe()
        number, left, tokens = trainings.cost
        if left:
            say_aside(f"{number} trainings, {left} to be done, of {tokens:,} tokens together")
        if (code := trainings.run()) is not None:
            return code
    return _report(study, trainings.failed, parts)


def _check(study: Plan, trainings: SectionTrainings) -> None:
    """Check what can be before anything is trained, besides the first pretraining.

    Raises:
        BadInput: it lists every problem.
    """
    pretrainings = {one.run_dir: one for group in trainings.pretrainings().values() for one in group}
    problems = problems_of(list(pretrainings.values()))
    if Section.long_range in study.sections:
        problems += problems_of_rows(rows_of(held_out_batches(study)))
    if problems:
        raise BadInput(problems)


def _report(study: Plan, failed: Mapping[Section, str], parts: Mapping[Section, Part]) -> int:
    """Measure, write what was found, and log it."""
    found = findings(Results(study, failed, say_aside), failed, parts)
    faults: list[str] = []

    def fault(said: str) -> None:
        faults.append(said)
        say_aside(said)

    text_of, drawn = partial(as_text, parts=parts, say=fault), partial(draw, parts=parts, say=fault)
    pictures = write_results(study.folder, "study", found, text_of, drawn)
    _log(study, found, tables(found, parts, fault), pictures)
    return int(bool(faults) or any(FAILED in section for section in found["sections"].values()))


def _log(study: Plan, found: Mapping[str, Any], logged: Mapping[str, Table], pictures: Sequence[Path]) -> None:
    config = {"study": to_jsonable(asdict(study.settings)), **to_jsonable(asdict(study.config))}
    summary = {key: value for section in found["sections"].values() for key, value in section.items()
               if key in ("orderings", "efficiency_gain")}  # fmt: skip
    wandb_of_study(study.config.wandb, study.folder, config, logged, pictures, summary)
