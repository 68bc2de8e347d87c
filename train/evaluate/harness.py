"""Tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), asked of a model on whatever layout it lies.

lm-eval reads, formats and judges; the model answers through `train.evaluate.harness_model`. Data is read, and questions
are written, when a task is opened, before the first step; an evaluation does neither again.
"""

import importlib.util
import logging
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.eval_settings import LM_EVAL, TaskSpec
from conf.paths import expanded
from model.problems import BadInput
from train.evaluate.tasks import Asked, Figures, Scorer, Speech

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_NEAR = 3
"""Names that are offered in place of one that lm-eval does not know."""
_ALL = "none"
"""lm-eval's name for answers as they come, in place of a filter of them."""
_checked: dict[tuple[TaskSpec, Asked], Mapping[str, Any]] = {}
"""What `problems` has loaded and found sound, until it is opened."""


def problems(spec: TaskSpec, asked: Asked) -> list[str]:
    """Find what keeps a task of lm-eval from being asked, in a sentence each; its data is read."""
    try:
        _checked[spec, asked] = _loaded(spec, asked)
    except BadInput as error:
        return error.problems
    return []


class HarnessTask:
    """A task, a group or a tag of lm-eval, with its questions written.

    Its figures are those that `lm_eval.simple_evaluate` has of the exported model: `acc`, or `exact_match/strict` where
    a task filters answers in several ways. Those of the tasks of a group or tag stand below their names, as in
    `mmlu_anatomy/acc`. Standard errors are left out: lm-eval draws 100,000 samples for some.

    Attributes:
        name: of its figures.
        notes: what is to be said of it, in a clause each.

    Raises:
        BadInput: it is not there, its data cannot be read, or it asks for what cannot be answered here.
    """

    def __init__(self, spec: TaskSpec, asked: Asked, speech: Speech):
        from train.evaluate.harness_model import HarnessModel

        self.name = spec.name
        self._given, self._limit = spec.given.removeprefix(LM_EVAL), asked.limit
        self._loaded = _checked.pop((spec, asked), {}) or _loaded(spec, asked)
        self._model = HarnessModel(speech)
        with _seeded_as_lm_eval():
            for task in self._loaded["tasks"].values():
                _write_questions(task, asked.limit)
        self.notes, found = list[str](), list[str]()
        for task in self._loaded["tasks"].values():
            try:
                cut = self._model.read(task.instances)
            except BadInput as error:
                found += [f"{spec.key}={spec.given}: {task.task_name}: {problem}" for problem in error.problems]
            else:
                self.notes += [
                    f"{task.task_name}: {cut:,} of {len(task.instances):,} texts are cut from the left to the model's "
                    f"context of {speech.max_seq_len:,} tokens, as lm-eval cuts them"
                ] * (cut > 0)
        if found:
            raise BadInput(found)
        self.notes += [
            f"{task.task_name}: {shots} examples before each question, as the task itself says, whatever is asked for"
            for task in self._loaded["tasks"].values()
            if asked.shots and (shots := task.get_config("num_fewshot")) != asked.shots
        ]

    def evaluate(self, scorer: Scorer) -> Figures:
        """Ask all questions.

        Raises:
            Exception: whatever a task raises as it judges answers.
        """
        from lm_eval import evaluator

        self._model.scorer = scorer
        with _seeded_as_lm_eval():
            found = evaluator.evaluate(
                lm=self._model,
                task_dict=self._loaded,
                limit=self._limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        return _figures(found["results"], self._given)


def _figures(results: Mapping[str, Mapping[str, Any]], given: str) -> Figures:
    """Take the figures out of lm-eval's results, which are named by metric and filter, as in `acc,none`."""
    figures: Figures = {}
    for task, found in results.items():
        values = {
            tuple(name.split(",", 1)): float(value)
            for name, value in found.items()
            if "," in name and isinstance(value, (int, float, np.number))
        }
        for (metric, way), value in values.items():
            alone = way == _ALL or sum(metric == other for other, _ in values) == 1
            named = metric if alone else f"{metric}/{way}"
            figures[named if task == given else f"{task}/{named}"] = value
    return figures


def _write_questions(task: Any, limit: int | None) -> None:
    """Write the questions of a task once; what builds them anew hereafter clears their answers alone."""
    task.build_all_requests(limit=limit)

    def again(**settings: Any) -> None:
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}

    task.build_all_requests = again


def _loaded(spec: TaskSpec, asked: Asked) -> Mapping[str, Any]:
    """Load a task, with the examples that are asked for, as `lm_eval.simple_evaluate` would.

    Returns:
        What lm-eval's `TaskManager.load` returns: `tasks` by name, `groups` by name, `group_map`.

    Raises:
        BadInput: see `HarnessTask`.
    """
    said, name = f"{spec.key}={spec.given}", spec.given.removeprefix(LM_EVAL)
    if importlib.util.find_spec("lm_eval") is None:
        raise BadInput([f"{said}: lm-eval is not installed; pip install 'deepnarrow[eval]' would work"])
    manager = _manager_of(spec, name, asked.include_path)
    try:
        with _seeded_as_lm_eval():
            loaded = manager.load([name])
    except Exception as error:  # of lm-eval, of the task's own code, of the hub and the disk
        raise BadInput([_unread(said, error)]) from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise BadInput([f"{said}: runs code that the model writes, which is not done here; lm-eval itself would, "
                            "on the exported model (deepnarrow export)"])  # fmt: skip
        if getattr(task, "MULTIMODAL", False):
            raise BadInput([f"{said}: shows pictures or sound; a task of text would work"])
        if task.get_config("output_type") == "generate_until":
            _check_completions(said, task)
        own = task.get_config("num_fewshot")
        if own is None or (asked.shots and own):  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=asked.shots)
        task.set_fewshot_seed(seed=_lm_eval_seeds()[1])
    return loaded


def _check_completions(said: str, task: Any) -> None:
    """Raise `BadInput` for completions that are not made here; whether the context holds them is seen later."""
    from train.evaluate.harness_model import Generation

    try:
        Generation.of(task.get_config("generation_kwargs") or {}, context=sys.maxsize, end="")
    except BadInput as error:
        raise BadInput([f"{said}: {task.task_name}: {problem}" for problem in error.problems]) from None


def _manager_of(spec: TaskSpec, name: str, include_path: str | None) -> "TaskManager":
    """Return the index of tasks that knows a name: that of one's own tasks, or else one of these and lm-eval's own.

    Raises:
        BadInput: none does.
    """
    folder = None if include_path is None else expanded(include_path)
    if folder is not None and not folder.is_dir():
        works = "one with the YAML files of lm-eval tasks would work"
        key = "--include-path" if spec.key.startswith("--") else "eval.include_path"
        raise BadInput([f"{key}={include_path}: is no folder; {works}"])
    if folder is not None and name in (own := _manager(folder, False)).task_index:
        return own
    manager = _manager(folder, True)
    if name not in manager.task_index:
        from difflib import get_close_matches

        near = [LM_EVAL + one for one in get_close_matches(name, manager.all_tasks, _NEAR)]
        works = f"{' or '.join(near)} would work" if near else "lm-eval ls tasks lists those that are"
        where = f"in {include_path} or of its own" if folder else "of its own"
        raise BadInput([f"{spec.key}={spec.given}: lm-eval knows no such task {where}; {works}"])
    return manager


@cache
def _manager(folder: Path | None, lm_evals_own: bool) -> "TaskManager":
    """Index tasks by name; those of lm-eval are 14,000 files, which takes seconds."""
    from lm_eval.api import task
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    # Not what it says for each metric of a task that leaves the usual to it: the mean, higher is better.
    task.eval_logger.addFilter(lambda record: "using default" not in record.getMessage())
    task.tqdm = _unseen  # it shows a bar for each task of a group, whoever else writes to the terminal
    return TaskManager(include_path=folder, include_defaults=lm_evals_own)


def _unseen(iterable: Iterator[Any], **settings: Any) -> Iterator[Any]:
    return iterable


def _unread(said: str, error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")[:300]
    works = "a machine that reaches the hub, HF_HOME with what such a one has loaded and HF_HUB_OFFLINE=1, or a task"
    return f"{said}: cannot be loaded ({type(error).__name__}: {first}); {works} of local files would work"


def _lm_eval_seeds() -> tuple[int, int]:
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    return DEFAULT_RANDOM_SEED, DEFAULT_OTHER_SEED


@contextmanager
def _seeded_as_lm_eval() -> Iterator[None]:
    """Draw random numbers inside this context as `lm_eval.simple_evaluate` does, and then as if nothing had been drawn.

    Tasks shuffle by the global generators, from which a run draws as well.
    """
    first, others = _lm_eval_seeds()
    before = random.getstate(), np.random.get_state()
    random.seed(first)
    np.random.seed(others)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
