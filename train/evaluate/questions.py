"""Questions that stand in files of JSON lines: multiple choice and clozes, read as they are and judged before a run.

A line that is no question is refused, with its place: a score over the others would be one of another task.
"""

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec

from conf.eval_settings import BUILT_IN, LM_EVAL, TaskSpec, name_of
from conf.paths import expanded
from model.problems import BadInput
from train.data.formats.remote import is_url
from train.evaluate.tasks import Asked

_ENDINGS = (".jsonl", ".ndjson", ".jsonlines", ".json")
_COMPRESSED = ("", ".gz", ".zst")
_MAX_NAMED = 3


@dataclass(frozen=True)
class Question:
    """A question, or an example with its answer.

    Attributes:
        context: what stands before the endings.
        endings: the choices; of a cloze its completion alone.
        answer: the index of the right one.
    """

    context: str
    endings: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Questions:
    """The questions of a file.

    Attributes:
        are_choices: whether they are multiple choice, else clozes.
        all: in the order of the file.
    """

    are_choices: bool
    all: list[Question]


def files_of(spec: TaskSpec) -> list[TaskSpec]:
    """Return the tasks of a path: itself, or one for each file of a folder.

    Raises:
        BadInput: nothing is there.
    """
    if is_url(spec.given):
        return [spec]
    path = expanded(spec.given)
    if path.is_file():
        return [spec]
    if not path.is_dir():
        raise BadInput([f"{spec.key}={spec.given}: no such task; {_what_works(path)}"])
    names = tuple(f"{ending}{packed}" for ending in _ENDINGS for packed in _COMPRESSED)
    found = sorted(one for one in path.iterdir() if one.name.endswith(names) and not one.name.startswith("."))
    if not found:
        raise BadInput([f"{spec.key}={spec.given}: the folder holds no file of JSON lines; one with {_ENDINGS[0]} "
                        "files would work"])  # fmt: skip
    return [replace(spec, given=str(one), name=f"{spec.name}/{name_of(one.name)}") for one in found]


def read(spec: TaskSpec) -> Questions:
    """Read the questions of a file.

    Raises:
        BadInput: it cannot be read, or has lines that are no questions; the first of these are named.
    """
    problems: list[str] = []
    found: list[Question] = []
    are_choices = None
    for number, line in _lines(spec):
        said = f"{spec.key}={spec.given}: line {number}"
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("is no JSON object")
            if are_choices is None:
                are_choices = _field(row, spec.choices) is not None
            found.append(_question(row, spec, are_choices))
        except (ValueError, RecursionError) as error:
            what = "is not JSON" if isinstance(error, json.JSONDecodeError | RecursionError) else str(error)
            problems.append(f"{said}: {what}; {_a_line(spec, are_choices)} would work")
    if not found and not problems:
        problems = [f"{spec.key}={spec.given}: has no line; {_a_line(spec, None)} would work"]
    if more := problems[_MAX_NAMED:]:
        problems[_MAX_NAMED:] = [f"{spec.key}={spec.given}: {len(more):,} more lines are no questions; a file of "
                                 "questions alone would work"]  # fmt: skip
    if problems:
        raise BadInput(problems)
    return Questions(bool(are_choices), found)


def problems(spec: TaskSpec, asked: Asked) -> list[str]:
    """Find what is wrong with the questions of a file, and with how they are asked."""
    try:
        return shot_problems(len(read(spec).all), spec, asked)
    except BadInput as error:
        return error.problems


def shot_problems(number: int, spec: TaskSpec, asked: Asked) -> list[str]:
    """Say that a file of so many questions has too few for the examples that are asked for."""
    if asked.shots < number:
        return []
    key = "eval.shots" if spec.key == "eval.tasks" else "--shots"
    return [f"{key}={asked.shots}: {spec.given} has {number:,} lines, of which one is the question; {key}={number - 1} "
            "is the most that works"]  # fmt: skip


def _lines(spec: TaskSpec) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file that are not blank, with their numbers from 1."""
    path = spec.given if is_url(spec.given) else str(expanded(spec.given))
    try:
        with fsspec.open(path, "rt", compression="infer", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except Exception as error:  # of the disk, of a store's client, of what is compressed or is no UTF-8
        raise BadInput([f"{spec.key}={spec.given}: cannot be read ({type(error).__name__}: {error}); JSON lines in "
                        "UTF-8, .gz or .zst too, would work"]) from error  # fmt: skip


def _question(row: Mapping[str, Any], spec: TaskSpec, are_choices: bool) -> Question:
    """Make a question of a line.

    Raises:
        ValueError: it is none; what is wrong with it, in a clause.
    """
    context = _text(row, spec.context)
    if not are_choices:
        return Question(context, (_text(row, spec.completion, empty=False),), 0)
    choices = _field(row, spec.choices)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise ValueError(f"{spec.choices} is no list of two texts or more")
    return Question(context, tuple(choices), _index(_field(row, spec.answer), choices, spec.answer))


def _index(answer: Any, choices: Sequence[str], name: str) -> int:
    """Return which choice an answer means: an index from 0, the choice itself, a letter, or an index as text."""
    index = -1
    if isinstance(answer, int) and not isinstance(answer, bool):
        index = answer
    elif isinstance(answer, str) and choices.count(answer) == 1:
        index = choices.index(answer)
    elif isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().isalpha():
        index = ord(answer.strip().upper()) - ord("A")
    elif isinstance(answer, str) and answer.strip().isdecimal():
        index = int(answer)
    if not 0 <= index < len(choices):
        raise ValueError(f"{name} is {answer!r}, which means none of its {len(choices)} choices")
    return index


def _text(row: Mapping[str, Any], name: str, empty: bool = True) -> str:
    value = _field(row, name)
    if not isinstance(value, str) or not (value or empty):
        there = ", ".join(row) or "no fields"
        raise ValueError(f"{name} is {'empty' if value == '' else 'no text'} (the line has {there})")
    return value


def _field(row: Any, name: str) -> Any:
    """Return a field of a line, None where it is not there; a dot that is in no field's name leads into an object."""
    if isinstance(row, Mapping) and name in row:
        return row[name]
    first, dot, rest = name.partition(".")
    return _field(row.get(first), rest) if dot and isinstance(row, Mapping) else None


def _a_line(spec: TaskSpec, are_choices: bool | None) -> str:
    choice = f'{{"{spec.context}": "…", "{spec.choices}": ["…", "…"], "{spec.answer}": 0}}'
    cloze = f'{{"{spec.context}": "…", "{spec.completion}": "…"}}'
    return f"{choice} or {cloze}" if are_choices is None else choice if are_choices else cloze


def _what_works(path: Path) -> str:
    """Say what is there in the place of a task that is not."""
    names = sorted(os.listdir(path.parent)) if path.parent.is_dir() else []
    near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, names, _MAX_NAMED, 0.6)]
    near += difflib.get_close_matches(str(path), BUILT_IN, 1, 0.6)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}a file or a folder of JSON lines, {', '.join(BUILT_IN)} or {LM_EVAL}NAME would work"
