"""The recipe that runs in a folder of a study share, kept there so that runs of another are not taken for them."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.schema import Config, recipe_fields, to_jsonable

RECIPE = "recipe.json"
_MEASURED = ("val_sequences", "precision")
"""Of `train`: no part of a recipe, but losses of runs that differ in them are not to be compared."""


def recipe_of(config: Config, own: Collection[str], extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what shapes the loss curve of all runs, and what their losses are measured with, as JSON holds it.

    Args:
        config: of a run.
        own: dotted keys that each run has its own value of, such as ``optimizer.lr``; they are left out.
        extra: further values by key, such as settings of the study, that decide what its runs are.
    """
    sections: dict[str, Any] = {
        name: to_jsonable(asdict(getattr(config, name))) for name in ("model", "data", "optimizer", "schedule", "train")
    }
    measured = {f"train.{key}": sections["train"][key] for key in _MEASURED}
    kept = {key: value for key, value in {**recipe_fields(sections), **measured}.items() if key not in own}
    found: dict[str, Any] = json.loads(json.dumps({**kept, **(extra or {})}))
    return found


def keep_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Write a recipe into a study's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", "utf-8")


def other_recipe(key: str, folder: Path, recipe: dict[str, Any]) -> list[str]:
    """Say that a folder holds runs of another recipe; nothing where it holds none.

    A key that the kept recipe lacks altogether counts as the same: the folder is older than the key.

    Args:
        key: the setting that names the folder.
        folder: of the study.
        recipe: of the runs that are asked for.
    """
    try:
        kept = json.loads((folder / RECIPE).read_text("utf-8"))
        differing = [name for name in sorted(kept) if kept[name] != recipe.get(name)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return [f"{folder / RECIPE}: cannot be read ({error}); another {key} would work"]
    if not differing:
        return []
    name = differing[0]
    more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
    return [
        f"{key}={folder}: holds runs of another recipe ({name}={kept[name]} there, {recipe.get(name)} here{more}); "
        "another folder, or the default, would work"
    ]
