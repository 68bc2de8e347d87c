"""A task that needs no file: which of four endings goes on a passage of a held-out document.

The other three go on passages of other documents. It is of the run's own corpus and of tokens, so that a small model
has a curve from its first steps on; scores of runs on other corpora or tokenizers do not compare.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from conf.schema import Config
from model.problems import BadInput
from parallel.scoring import Request
from train.data.prepare import PreparedData
from train.data.token_bytes import token_bytes
from train.evaluate import judged
from train.evaluate.judged import Scored
from train.evaluate.tasks import Asked, Figures, Scorer, Speech

QUESTIONS = 256
"""That are asked where no limit is set."""
CHOICES = 4
_CONTEXT, _ENDING = 64, 16
"""Tokens, where the model's context has room for as many."""


@dataclass(frozen=True)
class _Passage:
    """Tokens of a document, int64 (context + ending,), and whether they begin it."""

    document: int
    begins: bool
    tokens: NDArray[np.int64]


class Continuation:
    """The task of the run's held-out documents.

    Args:
        asked: how it is asked; there are no examples.
        speech: of the model, with the run's data.

    Attributes:
        name: of its figures.
        notes: what there is not.

    Raises:
        BadInput: the held-out documents are too few or too short.
    """

    def __init__(self, asked: Asked, speech: Speech):
        self.name, self.notes = "continuation", list[str]()
        if speech.data is None:
            raise BadInput(["continuation: is made of the held-out documents of a run; a run folder would work"])
        wanted = asked.limit or QUESTIONS
        passages = _passages(speech.data.by_name, speech.max_seq_len, max(wanted, CHOICES))
        if asked.shots:
            self.notes.append("it has no examples, whatever shots are asked for")
        if len(passages) < wanted:
            self.notes.append(
                f"the held-out documents have {len(passages):,} passages, and so many questions are asked"
            )
        context, _ = _lengths(speech.max_seq_len)
        endings = np.stack([passage.tokens for passage in passages])[:, context:]
        documents = np.array([passage.document for passage in passages])
        sizes = np.maximum(token_bytes(speech.tokenizer, speech.end).counts[endings].sum(1), 1).tolist()
        self._requests, self._questions = list[Request](), list[Scored]()
        for number, passage in enumerate(passages[:wanted]):
            random = np.random.default_rng([asked.seed, number])
            apart = (documents != passage.document) & (endings != endings[number]).any(1)
            if apart.sum() < CHOICES - 1:
                continue
            others = random.choice(np.flatnonzero(apart), CHOICES - 1, replace=False)
            chosen = random.permutation([number, *others]).tolist()
            head = [*([speech.end] if passage.begins else []), *passage.tokens[:context].tolist()]
            self._requests += [Request(head + endings[one].tolist(), len(head)) for one in chosen]
            of = tuple(sizes[one] for one in chosen)
            self._questions.append(Scored(of, chosen.index(number), sizes[number]))
        if alike := min(wanted, len(passages)) - len(self._questions):
            self.notes.append(f"{alike:,} passages go on as all others do, and are not asked for")
        if not self._questions:
            raise BadInput(["continuation: all held-out documents go on alike; another corpus would work"])

    def evaluate(self, scorer: Scorer) -> Figures:
        """Ask all questions."""
        return judged.of_choices(self._questions, scorer.score(self._requests))


def problems(data: Mapping[str, PreparedData], config: Config) -> list[str]:
    """Say why there is no such task of the prepared corpora of a run, in a sentence; nothing where there is."""
    try:
        _passages(data, config.model.max_seq_len, CHOICES)
    except BadInput as error:
        return error.problems
    return []


def _lengths(max_seq_len: int) -> tuple[int, int]:
    """Return the tokens of a context and of an ending; with the end token before them they fit the model's context."""
    return min(_CONTEXT, max_seq_len // 2), max(1, min(_ENDING, max_seq_len // 4))


def _passages(data: Mapping[str, PreparedData], max_seq_len: int, wanted: int) -> list[_Passage]:
    """Take so many passages of held-out documents, one of each that is long enough by turns, from all sources by turns.

    Raises:
        BadInput: too few documents are long enough, or it is not known where they end.
    """
    length = sum(_lengths(max_seq_len))
    spans: list[tuple[PreparedData, int, int]] = []
    sources = [_long_documents(of, length) for of in data.values()]
    while sources and len(spans) < wanted:
        for source in list(sources):
            span = next(source, None)
            if span is None:
                sources.remove(source)
            else:
                spans.append(span)
    if len(spans) < CHOICES:
        raise BadInput([f"continuation: {len(spans)} held-out documents have the {length} tokens that it takes, and it "
                        f"needs {CHOICES}; a larger data.val_fraction, or leaving it out, would work"])  # fmt: skip
    streams = {id(of): of.val(1).stream for of in data.values()}
    found: list[_Passage] = []
    at = 0
    while len(found) < wanted and any(end - begin > at + length for _, begin, end in spans):
        for number, (of, begin, end) in enumerate(spans):
            if end - begin > at + length and len(found) < wanted:  # the end token belongs to no passage
                found.append(_Passage(number, at == 0, streams[id(of)].read(begin + at, length)))
        at += length
    return found


def _long_documents(data: PreparedData, length: int) -> Iterator[tuple[PreparedData, int, int]]:
    """Yield where held-out documents of more than so many tokens begin and end, end token included."""
    begin = 0
    try:
        for ends in data.ends("val"):
            for end in ends.tolist():
                if end - begin > length:
                    yield data, begin, end
                begin = end
    except BadInput:
        raise BadInput(["continuation: the token files do not say where documents end; files with an .idx or .index, "
                        "or leaving it out, would work"]) from None  # fmt: skip
