"""Tasks that a model answers by the likelihoods that it gives to texts, and how they are found by their names.

A task runs on one process, rank 0, whatever the layout: the others compute what its scorer asks for
(`train.evaluate.lead`). What it raises costs no step; it is said, and tried again at the next evaluation.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from conf.eval_settings import BUILT_IN, LM_EVAL, TaskSpec
from conf.schema import Config
from model.problems import BadInput
from train.data.tokenizer import Encoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from model.generate import Sampling
    from parallel.scoring import Request, Score
    from train.data.sources import PreparedSources

Figures = dict[str, float]
"""What a task measures, by names such as accuracy; their means are over its questions."""


class Scorer(Protocol):
    """What asks the model that is measured, on whatever layout: `train.evaluate.lead.Leader`."""

    def score(self, requests: Sequence["Request"]) -> list["Score"]:
        """Compute the log-likelihoods that requests ask for, in their order."""

    def complete(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, ends: Collection[int], sampling: "Sampling"
    ) -> list[list[int]]:
        """Complete prompts with at most so many tokens each, which the context has room for; see `model.generate`."""


@dataclass(frozen=True)
class Speech:
    """How text is said to the model that is measured.

    Attributes:
        tokenizer: of Hugging Face's library.
        path: the tokenizer.json that it was loaded from.
        encode: encodes a text, behind whatever begins one (in our runs the end token of the document before).
        end: the token that ends a document.
        max_seq_len: the model's context, in tokens.
        data: the prepared corpora of the run, for tasks that are made of its held-out documents; None where there are
            none.
    """

    tokenizer: "Tokenizer"
    path: str
    encode: Callable[[str], list[int]]
    end: int
    max_seq_len: int
    data: "PreparedSources | None" = None

    @staticmethod
    def of_run(
        tokenizer: "Tokenizer", path: Path, end: int, max_seq_len: int, data: "PreparedSources | None"
    ) -> "Speech":
        """Return how text is said to a run of ours: as the documents that it is trained on, behind an end token."""
        encoder = Encoder(tokenizer)
        return Speech(tokenizer, str(path), lambda text: [end, *encoder.encode(text)], end, max_seq_len, data)


class Task(Protocol):
    """A task that is open: its questions are read and tokenised."""

    name: str
    """Of its figures in metrics.jsonl and W&B."""
    notes: list[str]
    """What is to be said of it when it is opened: what is cut, left out or guessed, in a clause each."""

    def evaluate(self, scorer: Scorer) -> Figures:
        """Ask the model all questions; the same model gives the same figures every time."""


@dataclass(frozen=True)
class Asked:
    """How tasks are asked.

    Attributes:
        limit: the most questions of a task, its first ones; None for all.
        shots: examples with their answers that stand before each question.
        seed: chooses them.
        include_path: a folder of tasks of one's own for lm-eval; None for none.
    """

    limit: int | None = None
    shots: int = 0
    seed: int = 1
    include_path: str | None = None

    @staticmethod
    def of(config: Config) -> "Asked":
        """Return how a run asks its tasks."""
        settings = config.eval
        return Asked(settings.limit, settings.shots, config.train.seed, settings.include_path)


def named(specs: Sequence[TaskSpec]) -> list[TaskSpec]:
    """Find what tasks are asked for: a folder is as many as it has files.

    Raises:
        BadInput: of every task that is not there, cannot be read, or has the name of another, with what would work.
    """
    from train.evaluate import questions

    found: list[TaskSpec] = []
    problems: list[str] = []
    for spec in specs:
        try:
            found += questions.files_of(spec) if spec.is_file else [spec]
        except BadInput as error:
            problems += error.problems
    by_name: dict[str, TaskSpec] = {}
    for spec in found:
        if (other := by_name.setdefault(spec.name, spec)) is not spec:
            problems.append(
                f"{spec.key}={spec.given}: bears the name {spec.name}, as {other.given} does; {{name: another, path: "
                f"{spec.given}}} would work"
            )
    if problems:
        raise BadInput(problems)
    return found


def check(specs: Sequence[TaskSpec], asked: Asked) -> list[str]:
    """Read the questions of all tasks, and find what is wrong with them, in a sentence each."""
    from train.evaluate import questions

    try:
        found = named(specs)
    except BadInput as error:
        return error.problems
    problems = []
    for spec in found:
        if spec.is_file:
            problems += questions.problems(spec, asked)
        elif spec.given.startswith(LM_EVAL):
            from train.evaluate import harness

            problems += harness.problems(spec, asked)
    return [*dict.fromkeys(problems)]  # a folder of tasks that is not there is what keeps each of them


def open_task(spec: TaskSpec, asked: Asked, speech: Speech) -> Task:
    """Open a task that `named` has found: read and tokenise its questions.

    Raises:
        BadInput: it cannot be read, or has no question that can be asked.
    """
    if spec.given in BUILT_IN:
        from train.evaluate.continuation import Continuation

        return Continuation(asked, speech)
    if spec.given.startswith(LM_EVAL):
        from train.evaluate import harness

        return harness.HarnessTask(spec, asked, speech)
    from train.evaluate.file_task import FileTask

    return FileTask(spec, asked, speech)
