"""A task whose questions stand in a file: each is written out, tokenised once, and asked by log-likelihood.

As lm-eval writes it (`lm_eval/api/model.py`, TemplateLM): a space stands between a context and an ending where neither
has white space there; white space at the end of a context belongs to the ending; what is scored are the tokens of both
together behind as many as the context alone has; and what does not fit the model's context is cut from the left.
"""

import random
from collections.abc import Sequence

from conf.eval_settings import TaskSpec
from model.problems import BadInput
from parallel.scoring import Request
from train.evaluate import judged, questions
from train.evaluate.judged import Scored
from train.evaluate.questions import Question
from train.evaluate.tasks import Asked, Figures, Scorer, Speech

_BETWEEN = "\n\n"
"""Stands between examples, and before the question."""


class FileTask:
    """The task of a file.

    Args:
        spec: of the task.
        asked: how it is asked.
        speech: of the model.

    Attributes:
        name: of its figures.
        notes: what is cut.

    Raises:
        BadInput: the file cannot be read, or is no task.
    """

    def __init__(self, spec: TaskSpec, asked: Asked, speech: Speech):
        found = questions.read(spec)
        if wrong := questions.shot_problems(len(found.all), spec, asked):
            raise BadInput(wrong)
        self.name, self.notes = spec.name, list[str]()
        self._are_choices = found.are_choices
        self._requests: list[Request] = []
        self._questions: list[Scored] = []
        cut = beheaded = 0
        for number, question in enumerate(found.all[: asked.limit]):
            context = _with_examples(question, _examples(found.all, number, asked))
            made = [pair(context, ending, speech) for ending in question.endings]
            self._requests += [request for request, _, _ in made]
            cut += any(lost for _, _, lost in made)
            beheaded += any(lost and request.first == 1 for request, _, lost in made)
            sizes = tuple(len(ending.strip().encode("utf-8")) or 1 for ending in question.endings)
            self._questions.append(Scored(sizes, question.answer, made[question.answer][1]))
        if cut:
            some = f", {beheaded:,} of them within an ending" if beheaded else ""
            self.notes.append(
                f"{cut:,} of {len(self._questions):,} questions are cut from the left to the model's context of "
                f"{speech.max_seq_len:,} tokens{some}"
            )

    def evaluate(self, scorer: Scorer) -> Figures:
        """Ask all questions."""
        scores = scorer.score(self._requests)
        return (judged.of_choices if self._are_choices else judged.of_clozes)(self._questions, scores)


def pair(context: str, ending: str, speech: Speech) -> tuple[Request, int, bool]:
    """Make the request for an ending behind a context.

    Returns:
        The request, the bytes of the text that it scores, and whether tokens had to be cut off.
    """
    if context and not context[-1].isspace() and not ending[0].isspace():
        ending = f" {ending}"
    before = context.rstrip()
    ending = context[len(before) :] + ending
    head, whole = speech.encode(before), speech.encode(before + ending)
    if not head:  # nothing begins a text, and there is no context: an end token stands before it, as lm-eval has it
        head, whole = [speech.end], [speech.end, *whole]
    first = min(len(head), len(whole) - 1)
    lost = max(0, len(whole) - speech.max_seq_len - 1)
    request = Request(whole[lost:], max(1, first - lost))
    return request, len(ending.encode("utf-8")), lost > 0


def _examples(every: Sequence[Question], number: int, asked: Asked) -> list[Question]:
    """Choose the examples that stand before a question, never itself; the same ones every time."""
    others = range(len(every) - 1)
    chosen = random.Random(f"{asked.seed} {number}").sample(others, asked.shots)
    return [every[one + (one >= number)] for one in chosen]


def _with_examples(question: Question, examples: Sequence[Question]) -> str:
    """Write the context of a question out, behind examples with their answers."""
    said = []
    for example in examples:
        right = example.endings[example.answer]
        apart = bool(example.context) and not example.context[-1].isspace() and not right[0].isspace()
        said.append(f"{example.context}{' ' if apart else ''}{right}")
    return _BETWEEN.join([*said, question.context])
