"""What came of a study's runs, read from their folders."""

from collections.abc import Iterable, Sequence

from launch.scaling.plan import Plan, Setting
from launch.trainings.outcomes import Outcome as OutcomeOf
from launch.trainings.outcomes import read_outcomes

Outcome = OutcomeOf[Setting]


def outcomes_of(study: Plan, settings: Iterable[Setting]) -> list[Outcome]:
    """Read what came of runs that are done.

    Raises:
        BadInput: folders hold runs that are not these, or that have measured no loss; it lists every one.
    """
    return read_outcomes((one, study.training(one).run_dir, one.steps, one.tokens) for one in settings)


def by_budget(outcomes: Sequence[Outcome]) -> dict[float, list[Outcome]]:
    """Return outcomes by what they were asked to cost, the smallest first."""
    found: dict[float, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda one: one.setting.budget):
        found.setdefault(outcome.setting.budget, []).append(outcome)
    return found
