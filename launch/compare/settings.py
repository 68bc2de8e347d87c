"""Which settings of runs differ: those that shape the loss curve, those of how it is computed, and all others."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from conf.schema import Config, recipe_fields, to_jsonable
from launch.run_folder import RunFolder, flat, shown_settings
from model.config import EXECUTION_KEYS

ABSENT = "(none)"
"""In the place of a setting that a run does not have: it is from before there was such a one, or its name is free."""
RECIPE, EXECUTION, OTHER, FOLLOWS, CODE = "recipe", "layout and execution", "other settings", "what follows", "code"
GROUPS = {
    RECIPE: "what shapes the loss curve",
    EXECUTION: "layout, and how it is computed",
    OTHER: "other settings",
    FOLLOWS: "what follows from them",
    CODE: "code",
}
"""The groups of what can differ, in their order, and what each is called above its table."""
_EXECUTION = {
    "train.micro_batch",
    "train.precision",
    "train.deterministic",
    *(f"model.{key}" for key in EXECUTION_KEYS),
}
_SHAPES_TOO = ("init_from", "train.skip_steps", "train.skip_samples_at")
"""What a run may change and stay the same run, and that shapes its loss all the same."""
_NAMES = ("name", "preset")
"""Settings that follow from the others, or only call a run something."""
_FACTS = ("parameters", "steps", "tokens", "flops_per_token", "world_size", "device", "precision", "kernels", "data")
"""What a run has noted of itself that follows from its settings and from where it runs."""


def differing(runs: Sequence[RunFolder]) -> tuple[dict[str, dict[str, list[Any]]], list[str]]:
    """Find what runs have been told, or have made of it, that is not the same in all of them.

    Args:
        runs: their folders.

    Returns:
        By the groups of `GROUPS` that have anything: the value that each run has, by dotted key, in the order in which
        the settings are declared. And the keys that are left out: some runs are too old to have them, and the others
        have the default.
    """
    defaults = to_jsonable(asdict(Config()))
    recipe, by_default = {*recipe_fields(defaults), *_SHAPES_TOO}, flat(defaults)
    settings = [_settings(run) for run in runs]
    found: dict[str, dict[str, list[Any]]] = {group: {} for group in GROUPS}
    unknown = []
    keys = [*dict.fromkeys(key for of in settings for key in of)]
    for key in keys:
        if any(other.startswith(f"{key}.") for other in keys):  # empty in one run; in others its parts say more
            continue
        if key in _NAMES:
            group = FOLLOWS
        elif key in _EXECUTION or key.startswith("parallel."):
            group = EXECUTION
        else:
            group = RECIPE if ".".join(key.split(".")[:2]) in recipe else OTHER
        values = [of.get(key, ABSENT) for of in settings]
        if ABSENT in values and all(value in (ABSENT, by_default.get(key, ABSENT)) for value in values):
            unknown.append(key)
        else:
            found[group][key] = values
    facts = [flat({key: run.facts[key] for key in _FACTS if key in run.facts}) for run in runs]
    for key in dict.fromkeys(key for of in facts for key in of):
        found[FOLLOWS][key] = [of.get(key, ABSENT) for of in facts]
    found[FOLLOWS]["blocks of the stages"] = [_blocks(run.facts.get("layout")) for run in runs]
    found[CODE]["commit or version"] = [run.facts.get("code", ABSENT) for run in runs]
    differ = {
        group: {key: values for key, values in of.items() if any(value != values[0] for value in values)}
        for group, of in found.items()
    }
    return {group: of for group, of in differ.items() if of}, unknown


def _settings(run: RunFolder) -> dict[str, Any]:
    """Return the settings of a run by dotted key, with those of the recipe that it is too old to have."""
    try:
        recipe = recipe_fields(run.config)
    except (KeyError, AttributeError, TypeError):  # no whole configuration
        recipe = {}
    return {**shown_settings(run.config), **{key: value for key, value in flat(recipe).items() if value != {}}}


def _blocks(layout: Any) -> Any:
    """Return how many layers each stage has, as a run has noted it."""
    try:
        return [stage["stop"] - stage["start"] for stage in layout["stages"]]
    except (KeyError, TypeError):
        return ABSENT


def layout_of(run: RunFolder) -> str:
    """Say the layout of a run, as ``pp2 tp1 dp4, zbv``; empty where it is not known."""
    layout, parallel = run.facts.get("layout"), run.config.get("parallel")
    if not isinstance(layout, Mapping):
        return ""
    said = " ".join(f"{axis}{layout.get(axis, '?')}" for axis in ("pp", "tp", "dp"))
    schedule = parallel.get("schedule") if isinstance(parallel, Mapping) else None
    return f"{said}, {schedule}" if schedule and layout.get("pp") != 1 else said
