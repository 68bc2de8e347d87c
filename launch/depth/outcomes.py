"""What came of a study's runs, read from their folders."""

import math
from collections.abc import Iterable, Sequence

from launch.depth.plan import Plan, Setting
from launch.trainings.outcomes import Outcome as OutcomeOf
from launch.trainings.outcomes import read_outcomes

Outcome = OutcomeOf[Setting]


def outcomes_of(study: Plan, settings: Iterable[Setting]) -> list[Outcome]:
    """Read what came of runs that are done.

    Raises:
        BadInput: folders hold runs that are not these, or that have measured no loss; it lists every one.
    """
    return read_outcomes((one, study.training(one).run_dir, study.steps, study.tokens) for one in settings)


def best_rates(tried: Sequence[Outcome]) -> dict[str, float]:
    """Return the rate with the least loss of each model by name; one that diverged at every rate has none."""
    found: dict[str, Outcome] = {}
    for one in tried:
        name = one.setting.model
        if math.isfinite(one.loss) and (name not in found or one.loss < found[name].loss):
            found[name] = one
    return {name: one.setting.lr for name, one in found.items()}
