"""What came of a study's runs, read from their folders."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.scaling.plan import Plan, Setting
from launch.trainings.train_all import is_complete, last_record, val_losses
from model.problems import BadInput
from train.records import SUMMARY


@dataclass(frozen=True)
class Outcome:
    """A run and its end.

    Attributes:
        setting: of the run.
        loss: the validation loss after its last step, in nats a token; NaN where it diverged.
        bits_per_byte: the same in bits a byte of text; NaN where it is not known.
        skipped_steps: steps whose updates were skipped.
    """

    setting: Setting
    loss: float
    bits_per_byte: float = math.nan
    skipped_steps: int = 0


def outcomes_of(study: Plan, settings: Iterable[Setting]) -> list[Outcome]:
    """Read what came of runs that are done.

    Raises:
        BadInput: folders hold runs that are not these, or that have measured no loss; it lists every one.
    """
    found, problems = [], []
    for setting in settings:
        run_dir = study.training(setting).run_dir
        if not is_complete(run_dir):  # it is done all the same: it has diverged
            found.append(Outcome(setting, math.nan, skipped_steps=_skipped(run_dir)))
            continue
        losses, last = val_losses(run_dir), last_record(run_dir)
        if setting.steps not in losses or last.get("tokens") not in (None, setting.tokens):
            works = "removing this folder, which trains it again, would work"
            problems.append(f"{run_dir}: has no validation loss after step {setting.steps}; {works}")
            continue
        bits = last.get("val_bits_per_byte", math.nan)
        found.append(Outcome(setting, losses[setting.steps], bits, _skipped(run_dir)))
    if problems:
        raise BadInput(problems)
    return found


def _skipped(run_dir: Path) -> int:
    return int(json.loads((run_dir / SUMMARY).read_text("utf-8")).get("skipped_steps") or 0)


def by_budget(outcomes: Sequence[Outcome]) -> dict[float, list[Outcome]]:
    """Return outcomes by what they were asked to cost, the smallest first."""
    found: dict[float, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda one: one.setting.budget):
        found.setdefault(outcome.setting.budget, []).append(outcome)
    return found
