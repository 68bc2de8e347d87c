"""What the scores of questions come to, as the literature counts it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel.scoring import Score
    from train.evaluate.tasks import Figures


@dataclass(frozen=True)
class Scored:
    """What of a question its judgement needs.

    Attributes:
        sizes: the bytes of each ending, without white space before it; at least 1.
        answer: the index of the right one.
        scored_bytes: the bytes of the text that is scored of the right one, white space before it included.
    """

    sizes: tuple[int, ...]
    answer: int
    scored_bytes: int


def of_choices(questions: Sequence[Scored], scores: Sequence["Score"]) -> "Figures":
    """Judge multiple choice.

    Args:
        questions: at least one.
        scores: of their endings, one question's behind the other's.

    Returns:
        accuracy: the share of questions whose right ending is the likeliest. accuracy_norm: the same by log-likelihood
        per byte of the ending, which lm-eval calls acc_norm. bits_per_byte: of the right ending, the mean over the
        questions. Of equally likely endings the first is taken.
    """
    likeliest = by_bytes = 0
    bits, at = 0.0, 0
    for question in questions:
        found = [score.log_likelihood for score in scores[at : at + len(question.sizes)]]
        at += len(found)
        likeliest += _first_largest(found) == question.answer
        normed = [value / size for value, size in zip(found, question.sizes, strict=True)]
        by_bytes += _first_largest(normed) == question.answer
        bits -= found[question.answer] / math.log(2) / question.scored_bytes
    number = len(questions)
    return {"accuracy": likeliest / number, "accuracy_norm": by_bytes / number, "bits_per_byte": bits / number}


def of_clozes(questions: Sequence[Scored], scores: Sequence["Score"]) -> "Figures":
    """Judge clozes, as LAMBADA's are (Paperno et al., arXiv 1606.06031).

    Args:
        questions: at least one.
        scores: of their completions.

    Returns:
        accuracy: the share of completions of which every token is the likeliest. perplexity: the exponential of the
        mean nats of a completion. bits_per_byte: the mean over the questions.
    """
    pairs = list(zip(questions, scores, strict=True))
    nats = -sum(score.log_likelihood for _, score in pairs) / len(pairs)
    bits = -sum(score.log_likelihood / math.log(2) / question.scored_bytes for question, score in pairs)
    accuracy = sum(score.greedy for _, score in pairs) / len(pairs)
    return {"accuracy": accuracy, "perplexity": perplexity(nats), "bits_per_byte": bits / len(pairs)}


def perplexity(nats: float) -> float:
    """Return the exponential of nats; infinite where it is beyond any float."""
    return math.exp(nats) if not nats > 700 else math.inf


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def shown(figures: "Figures") -> str:
    """Set figures for people, as ``loss 3.2104, perplexity 24.79, bits_per_byte 1.0512``."""
    return ", ".join(
        f"{name} {value:.4g}" if value >= 100 else f"{name} {value:.4f}" for name, value in figures.items()
    )


def lines(record: Mapping[str, Any]) -> list[str]:
    """Set what a record says of sets and tasks, a line each."""
    return [f"{name}: {shown(of)}" for key in ("val_sets", "tasks") for name, of in (record.get(key) or {}).items()]
