"""Cluster files that measurements write, for `--cluster FILE` of a plan and `cluster=FILE` of a run."""

import os
from collections.abc import Mapping
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from conf.clusters import cluster_from_file
from conf.paths import unwritable
from model.problems import BadInput
from parallel.plan.cluster import Cluster


def save_problems(path: Path | None) -> list[str]:
    """Say why a cluster file cannot be written, or what is there cannot be one, before anything is measured."""
    if path is None:
        return []
    if path.is_dir():
        return [f"--save={path}: is a folder; a file in it, such as {path / 'cluster.yaml'}, would work"]
    if path.suffix not in (".yaml", ".yml"):
        return [f"--save={path}: is to be YAML; {path.with_suffix('.yaml')} would work"]
    if why := unwritable(path.absolute().parent):
        return [f"--save={path}: {why}; a file in a folder that can be written would work"]
    if path.exists():
        try:
            cluster_from_file(path)
        except BadInput as error:
            return [problem.replace("--cluster=", "--save=", 1) for problem in error.problems]
    return []


def save(path: Path, values: Mapping[str, Any], said: str, facts: Mapping[str, Any] | None = None) -> list[str]:
    """Write measured keys of a cluster into a file, atomically; what else it says stays, but its comments.

    Args:
        path: for which `save_problems` is empty; it need not be there.
        values: the keys of `parallel.plan.cluster.Cluster` that were measured.
        said: how they were measured, for the comment at the top.
        facts: keys that need no measuring; what the file says of them already stays.

    Returns:
        The keys that were there with another value, and are replaced.
    """
    known = [one.name for one in fields(Cluster)]
    facts = facts or {}
    assert {*values, *facts} <= set(known)
    before = yaml.safe_load(path.read_text("utf-8")) or {} if path.exists() else {}
    content = {**facts, **before, **values, "measured": sorted({*before.get("measured", []), *values}, key=known.index)}
    ordered = {key: content[key] for key in ("preset", *known) if key in content}
    text = f"# {said}, {date.today().isoformat()}\n" + yaml.safe_dump(ordered, sort_keys=False, default_flow_style=None)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, "utf-8")
    os.replace(draft, path)
    return [key for key, value in values.items() if key in before and before[key] != value]
