"""The settings of evaluation: what a model is asked while it trains, and when."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from conf.paths import path_problems
from conf.train_settings import NamedCorpus

BUILT_IN = ("continuation",)
"""Tasks that need no file."""
LM_EVAL = "lm_eval/"
"""Stands before the name of a task of lm-eval."""


@dataclass
class EvalConfig:
    """What is measured besides the held-out documents of the run's own corpus (train.val_every), and when."""

    every_steps: int | None = None
    """Steps from one evaluation of `tasks` and `sets` to the next; null evaluates after the last step alone."""
    at: list[int] = field(default_factory=list)
    """Steps after which to evaluate as well."""
    tasks: list[Any] = field(default_factory=list)
    """Tasks that are answered by log-likelihood: files or folders of JSON lines, such as [/tasks/arc.jsonl,/tasks/own],
    and names. A line {"context": …, "choices": […], "answer": 0} is multiple choice, the answer an index, a letter or
    the choice itself: accuracy, accuracy_norm (by log-likelihood per byte, as lm-eval's acc_norm is meant) and the bits
    per byte of the right choice. A line {"context": …, "completion": …} is a cloze as LAMBADA is: accuracy (every token
    of the completion is the likeliest), perplexity of the completion, and its bits per byte. Other people's files may
    name their fields: {path: /tasks/a.jsonl, context: question, choices: choices.text, answer: answerKey}; `name` is
    what the task is called. `continuation` needs no file: of the run's own held-out documents, which of four endings is
    the right one, the others being of other documents. lm_eval/NAME is a task, a group or a tag of lm-eval (pip install
    'deepnarrow[eval]'), with the metrics that lm-eval gives it, such as acc, acc_norm, perplexity and exact_match."""
    include_path: str | None = None
    """A folder of YAML tasks that lm-eval knows as well as its own, for lm_eval/NAME."""
    sets: dict[str, NamedCorpus] = field(default_factory=dict)
    """Held-out sets by name, such as {pile: {path: /pile/val.jsonl.zst}}: all of their documents are held out. They are
    tokenised with the run's tokenizer, cut and measured as held-out documents are, train.val_sequences at most."""
    limit: int | None = None
    """The most questions of each task, its first ones; null asks all, and of `continuation` 256."""
    shots: int = 0
    """Examples with their answers before each question, of the same file and never the question itself; train.seed
    chooses them. Tasks of lm-eval choose theirs themselves, and 0 leaves them the number that they ask for."""


@dataclass(frozen=True)
class TaskSpec:
    """A task as it is asked for.

    Attributes:
        given: the path or the name.
        name: of its figures.
        context, choices, answer, completion: the fields of a line; a dot leads into a field that is an object.
        key: the setting or argument that asks for it.
    """

    given: str
    name: str
    context: str = "context"
    choices: str = "choices"
    answer: str = "answer"
    completion: str = "completion"
    key: str = "eval.tasks"

    @property
    def is_file(self) -> bool:
        """Whether its questions stand in a file or in the files of a folder."""
        return self.given not in BUILT_IN and not self.given.startswith(LM_EVAL)


def task_specs(given: Iterable[Any], key: str = "eval.tasks") -> tuple[list[TaskSpec], list[str]]:
    """Read what tasks are asked for, and find what cannot be meant, in a sentence each.

    Args:
        given: paths and names, or mappings of `path` and of fields.
        key: the setting or argument.
    """
    specs, problems = [], []
    known = ["path", *(each.name for each in fields(TaskSpec) if each.name not in ("given", "key"))]
    for one in given:
        told = dict(one) if isinstance(one, Mapping) else {"path": one}
        path = told.pop("path", None)
        if not isinstance(path, str):
            works = "a path, a name, or {path: FILE, context: FIELD} would work"
            problems.append(f"{key}={one}: {'has no path' if path is None else 'is no text'}; {works}")
            continue
        if wrong := [name for name, value in told.items() if name not in known or not isinstance(value, str)]:
            problems.append(f"{key}={path}: {', '.join(map(str, wrong))}: no text by a name that tasks have; "
                            f"{', '.join(known)} would work")  # fmt: skip
            continue
        spec = TaskSpec(**{"given": path, "name": name_of(path), "key": key, **told})
        found = path_problems(key, path) if spec.is_file else []
        if not re.fullmatch(r"[\w.:-]+(/[\w.:-]+)*", spec.name):
            found.append(f"{key}={path}: the task's name, {spec.name}, stands in metrics.jsonl and W&B; "
                         f"{{path: {path}, name: …}} of letters, digits, _, . and - would work")  # fmt: skip
        if told and not spec.is_file:
            found.append(f"{key}={path}: no file, whose fields have names; {path} alone would work")
        specs += [] if found else [spec]
        problems += found
    return specs, problems


def problems(settings: EvalConfig, sources: Iterable[str]) -> list[str]:
    """Find what is wrong with the settings alone; whether tasks are there is not looked at.

    Args:
        settings: of evaluation.
        sources: the names of the run's corpora, beside which the sets stand in records.
    """
    found = task_specs(settings.tasks)[1]
    for key, instead in (("every_steps", "to evaluate after the last step alone"), ("limit", "to ask all questions")):
        value = getattr(settings, key)
        if value is not None and value < 1:
            found.append(f"eval.{key}={value}: must be at least 1, or null {instead}")
    if settings.shots < 0:
        found.append(f"eval.shots={settings.shots}: must be at least 0")
    if any(step < 1 for step in settings.at):
        found.append(f"eval.at={settings.at}: steps count from 1")
    if (settings.every_steps or settings.at) and not (settings.tasks or settings.sets):
        key = "every_steps" if settings.every_steps else "at"
        found.append(f"eval.{key}={getattr(settings, key)}: there is nothing to evaluate; eval.tasks=[continuation] or "
                     "eval.sets={…} would be, and train.val_every says when to validate")  # fmt: skip
    for name, one in settings.sets.items():
        key = f"eval.sets.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in sources:
            why = "is a source of the run" if name in sources else "letters, digits, _ and - alone stand in records"
            found.append(f"{key}: {why}; another name would work")
        if one.source is None and one.path is not None and one.name is not None:
            found.append(
                f"{key}: has a path and a name; {key}.source=files or {key}.source=hub would say which is meant"
            )
    return found


def name_of(path: str) -> str:
    """Name a task after its file, without what compresses it."""
    if path.startswith(LM_EVAL):
        return path
    stem = Path(path).name
    for ending in (".gz", ".zst", ".jsonl", ".ndjson", ".jsonlines", ".json"):
        stem = stem.removesuffix(ending)
    return stem
