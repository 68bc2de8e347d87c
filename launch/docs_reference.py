"""The reference of the configuration, as Markdown: every key with its default, its type, and what is said beside it.

    python -m launch.docs_reference > docs/configuration-reference.md

A test holds the page to what this prints, so that it says what the dataclasses say.
"""

import ast
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import conf
from conf.schema import Config
from conf.train_settings import DataStage, NamedCorpus, SourceConfig
from launch.depth.settings import DepthSettings
from launch.refine.settings import RefineSettings
from launch.scaling.settings import ScalingSettings
from launch.study.settings import StudySettings
from parallel.plan.cluster import Cluster

_HEAD = """\
# Configuration reference

Every key that an override may set, with its default and its type. This page is written by
`python -m launch.docs_reference` from the dataclasses themselves; [configuration](configuration.md) says how overrides,
presets and files of your own go together. A preset changes defaults: `model=7b` sets the 7B's shape and the recipe that
goes with it. Where none is named, `model=tiny`, `data=stdlib` and `schedule=multi_step` are taken.
"""
_COMMANDS: tuple[tuple[str, str, type], ...] = (
    ("refine", "deepnarrow refine", RefineSettings),
    ("scaling", "deepnarrow scaling", ScalingSettings),
    ("study", "deepnarrow gqa-study", StudySettings),
    ("depth", "deepnarrow depth-study", DepthSettings),
)
"""Settings of one command: what stands before their keys, the command, and their dataclass."""
_NAMED: dict[str, type] = {"data.sources": SourceConfig, "data.stages": DataStage, "eval.sets": NamedCorpus}
"""Keys that hold dataclasses by name or in a list, whose keys stand in sections of their own."""


def page() -> str:
    """Return the whole page."""
    parts = [_HEAD, "## Presets\n", *_presets()]
    sections = [field for field in fields(Config) if is_dataclass(_type_of(Config, field))]
    parts += ["## Top\n", _said(inspect.getdoc(Config)), _keys(Config, "")]
    for field in sections:
        kind = _type_of(Config, field)
        parts += [f"## {field.name}\n", _said(inspect.getdoc(kind)), _keys(kind, f"{field.name}.")]
        for key, inner in _NAMED.items():
            if key.startswith(f"{field.name}."):
                each = "in the list " if key == "data.stages" else "of a name in "
                parts += [
                    f"### {key}\n",
                    f"Keys of each {each}`{key}`. {_said(inspect.getdoc(inner))}",
                    _keys(inner, ""),
                ]
    for prefix, command, kind in _COMMANDS:
        parts += [f"## {prefix}, of one command\n", f"Of `{command}` alone. {_said(inspect.getdoc(kind))}"]
        parts += [_keys(kind, f"{prefix}.")]
    parts += ["## Cluster files\n"]
    parts += [
        f"Keys of a YAML file for `cluster` and `--cluster`. {_said(inspect.getdoc(Cluster))}",
        _keys(Cluster, ""),
    ]
    return "\n".join(parts)


def _presets() -> Iterator[str]:
    folder = Path(conf.__file__).parent
    yield "| override | what it is |\n|---|---|"
    for group in ("model", "data", "schedule"):
        for file in sorted((folder / group).glob("*.yaml")):
            comments = [line[2:] for line in file.read_text("utf-8").splitlines() if line.startswith("# ")]
            said = " ".join(line for line in comments if not line.startswith("@package"))
            yield f"| `{group}={file.stem}` | {_said(said).strip()} |"
    yield ""


def _keys(kind: type, prefix: str) -> str:
    """Return the keys of a dataclass but for sections, a list item each, those of a base class first."""
    lines = []
    for field in fields(kind):
        of = _type_of(kind, field)
        if prefix == "" and kind is Config and is_dataclass(of):
            continue
        said = _said(_documented(kind).get(field.name, "")).strip()
        default = "" if is_dataclass(of) else f"={_shown(field)}"
        lines.append(f"- **`{prefix}{field.name}{default}`** ({_type_name(of)}). {said}")
        lines += [f"    - `{name}`: {_said(text).strip()}" for name, text in _members(of)]
        if is_dataclass(of):
            inner = _keys(typing.cast(type, of), f"{prefix}{field.name}.").rstrip("\n").splitlines()
            lines += [f"    {line}" for line in inner]
    return "\n".join(lines) + "\n"


def _type_of(kind: type, field: Field[Any]) -> Any:
    return typing.get_type_hints(kind)[field.name]


def _type_name(of: Any) -> str:
    """Name a type as a user would: an enum by its members, None as null."""
    if of is type(None):
        return "null"
    if of is Any:
        return "any"
    if isinstance(of, type) and issubclass(of, Enum):
        return " or ".join(one.name for one in of)
    origin, inner = typing.get_origin(of), typing.get_args(of)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type_name, inner))
    if origin is list:
        return f"list of {_type_name(inner[0])}"
    if origin is dict:
        return f"{_type_name(inner[1])} by name"
    if is_dataclass(of):
        return "section"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}[of.__name__]


def _members(of: Any) -> list[tuple[str, str]]:
    """Return the members of an enum that say what they are."""
    kinds = [of, *typing.get_args(of)]
    return [
        (name, said)
        for kind in kinds
        if isinstance(kind, type) and issubclass(kind, Enum)
        for name, said in _documented(kind).items()
    ]


def _shown(field: Field[Any]) -> str:
    """Write a default as an override would."""
    value = field.default if field.default is not MISSING else None
    if field.default_factory is not MISSING:
        value = field.default_factory()
    return _written(value)


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return str(value)


@cache
def _documented(kind: type) -> dict[str, str]:
    """Return what stands as a text behind each field of a class, those of its bases included."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        if cls.__module__.split(".")[0] not in ("conf", "launch", "model", "parallel", "train"):
            continue
        classes = [
            one for one in _tree(cls.__module__).body if isinstance(one, ast.ClassDef) and one.name == cls.__name__
        ]
        body = [line for one in classes for line in one.body]  # none of an enum that is made by a call
        for line, after in pairwise(body):
            target = line.target if isinstance(line, ast.AnnAssign) else line.targets[0] if _assigns(line) else None
            if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
                continue
            if isinstance(target, ast.Name):
                found[target.id] = inspect.cleandoc(str(after.value.value))
    return found


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(Path(str(sys.modules[module].__file__)).read_text("utf-8"))


def _assigns(line: ast.stmt) -> typing.TypeGuard[ast.Assign]:
    return isinstance(line, ast.Assign)


def _said(text: str | None) -> str:
    """Put a docstring on one line, with what Markdown would take for its own kept as it is."""
    parts = re.split(r"(`+[^`]+`+)", " ".join((text or "").split()))
    kept = [part if part.startswith("`") else re.sub(r"(\*|<|(?<!\w)_|\|)", r"\\\1", part) for part in parts]
    return "".join(kept) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
