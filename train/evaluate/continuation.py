"""A task that needs no file: which of four endings goes on from the beginning of a held-out document.

The other three are of other documents, from the same place in them. It is of the run's own corpus and of tokens, so
that a small model has a curve from its first steps on; scores of runs on other corpora or tokenizers do not compare.
"""

from collections.abc import Iterator, Mapping

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
        documents = _documents(speech.data.by_name, speech.max_seq_len, max(wanted, CHOICES))
        if asked.shots:
            self.notes.append("it has no examples, whatever shots are asked for")
        if len(documents) < wanted:
            self.notes.append(f"{len(documents):,} held-out documents are long enough, and so many questions are asked")
        context, _ = _lengths(speech.max_seq_len)
        endings = np.stack(documents)[:, context:]
        counts = token_bytes(speech.tokenizer, speech.end).counts
        sizes = np.maximum(counts[endings].sum(1), 1).tolist()
        self._requests, self._questions = list[Request](), list[Scored]()
        alike = 0
        for number, document in enumerate(documents[:wanted]):
            random = np.random.default_rng([asked.seed, number])
            others = [one for one in random.permutation(len(documents)) if (endings[one] != endings[number]).any()]
            if len(others) < CHOICES - 1:
                alike += 1
                continue
            chosen = random.permutation([number, *others[: CHOICES - 1]]).tolist()
            head = [speech.end, *document[:context].tolist()]
            self._requests += [Request(head + endings[one].tolist(), len(head)) for one in chosen]
            of = tuple(sizes[one] for one in chosen)
            self._questions.append(Scored(of, chosen.index(number), sizes[number]))
        if alike:
            self.notes.append(f"{alike:,} documents go on as all others do, and are not asked for")
        if not self._questions:
            raise BadInput(["continuation: all held-out documents go on alike; another corpus would work"])

    def evaluate(self, scorer: Scorer) -> Figures:
        """Ask all questions."""
        return judged.of_choices(self._questions, scorer.score(self._requests))


def problems(data: Mapping[str, PreparedData], config: Config) -> list[str]:
    """Say why there is no such task of the prepared corpora of a run, in a sentence; nothing where there is."""
    try:
        _documents(data, config.model.max_seq_len, CHOICES)
    except BadInput as error:
        return error.problems
    return []


def _lengths(max_seq_len: int) -> tuple[int, int]:
    """Return the tokens of a context and of an ending; with the end token before them they fit the model's context."""
    return min(_CONTEXT, max_seq_len // 2), max(1, min(_ENDING, max_seq_len // 4))


def _documents(data: Mapping[str, PreparedData], max_seq_len: int, wanted: int) -> list[NDArray[np.int64]]:
    """Take the beginnings of the first held-out documents that are long enough, from all sources by turns."""
    length = sum(_lengths(max_seq_len))
    found: list[NDArray[np.int64]] = []
    streams = [_beginnings(of, length) for of in data.values()]
    while streams and len(found) < wanted:
        for stream in list(streams):
            document = next(stream, None)
            if document is None:
                streams.remove(stream)
            elif len(found) < wanted:
                found.append(document)
    if len(found) < CHOICES:
        raise BadInput([f"continuation: {len(found)} held-out documents have the {length} tokens that it takes, and it "
                        f"needs {CHOICES}; a larger data.val_fraction, or leaving it out, would work"])  # fmt: skip
    return found


def _beginnings(data: PreparedData, length: int) -> Iterator[NDArray[np.int64]]:
    """Yield the first tokens of held-out documents that have more than so many, end token included."""
    stream, begin = data.val(1).stream, 0
    try:
        for ends in data.ends("val"):
            for end in ends.tolist():
                if end - begin > length:
                    yield stream.read(begin, length)
                begin = end
    except BadInput:
        raise BadInput(["continuation: the token files do not say where documents end; files with an .idx or .index, "
                        "or leaving it out, would work"]) from None  # fmt: skip
