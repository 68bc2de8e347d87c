"""What came of a study's runs, read from their folders."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launch.depth.plan import Plan, Setting
from launch.trainings.train_all import is_complete, last_record, val_losses
from model.problems import BadInput
from train.records import SUMMARY


@dataclass(frozen=True)
class Outcome:
    """A run and its end.

    Attributes:
        setting: of the run.
        loss: the validation loss after its last step, in nats a token; NaN where it diverged.
        skipped_steps: steps whose updates were skipped.
    """

    setting: Setting
    loss: float
    skipped_steps: int = 0


def outcomes_of(study: Plan, settings: Iterable[Setting]) -> list[Outcome]:
    """Read what came of runs that are done.

    Raises:
        BadInput: folders hold runs that are not these, or that have measured no loss; it lists every one.
    """
    found, problems = [], []
    for setting in settings:
        run_dir = study.training(setting).run_dir
        skipped = int(json.loads((run_dir / SUMMARY).read_text("utf-8")).get("skipped_steps") or 0)
        if not is_complete(run_dir):  # it is done all the same: it has diverged
            found.append(Outcome(setting, math.nan, skipped))
            continue
        losses, last = val_losses(run_dir), last_record(run_dir)
        if study.steps not in losses or last.get("tokens") not in (None, study.tokens):
            works = "removing this folder, which trains it again, would work"
            problems.append(f"{run_dir}: has no validation loss after step {study.steps}; {works}")
            continue
        found.append(Outcome(setting, losses[study.steps], skipped))
    if problems:
        raise BadInput(problems)
    return found


def best_rates(tried: Sequence[Outcome]) -> dict[str, float]:
    """Return the rate with the least loss of each model by name; one that diverged at every rate has none."""
    found: dict[str, Outcome] = {}
    for one in tried:
        name = one.setting.model
        if math.isfinite(one.loss) and (name not in found or one.loss < found[name].loss):
            found[name] = one
    return {name: one.setting.lr for name, one in found.items()}
