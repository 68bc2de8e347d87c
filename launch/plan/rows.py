"""The rows of a plan: what each layout takes, as numbers, as JSON, and as text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from conf.schema import to_jsonable
from launch.plan.request import KEYS, Request, overrides_of
from parallel.layout import Recompute
from parallel.plan.predict import Prediction, predict
from parallel.plan.search import Candidate, Choice, Found, Task, fastest_of_each, groups

GIB = 2**30
_HOUR, _DAY = 3600, 86400
_NAMES = {"traffic": "memory-bound", "host": "launches"}
"""What users read of the kinds of `Prediction.compute`."""


def gib(num_bytes: float) -> str:
    """Write bytes in GiB."""
    number = num_bytes / GIB
    return f"{number:,.1f}" if number >= 1 else f"{number:.2g}"


def counted(number: int, what: str) -> str:
    """Write a number of things: ``1 rank``, ``2 ranks``."""
    return f"{number:,} {what}{'s' * (number != 1)}"


@dataclass(frozen=True)
class Peak:
    """The peak memory of the rank of a pipeline that needs most.

    Attributes:
        rank: of the pipeline.
        parts: bytes by what fills it at that time.
        where: the pass at which it is reached; None by the formula, which does not say.
    """

    rank: int
    parts: Mapping[str, float]
    where: str | None = None

    @property
    def num_bytes(self) -> float:
        """All of it."""
        return sum(self.parts.values())

    @property
    def said(self) -> str:
        """What fills it, most first, as text."""
        parts = sorted(self.parts.items(), key=lambda part: -part[1])
        listed = ", ".join(f"{name} {gib(size)}" for name, size in parts if size >= 0.001 * self.num_bytes)
        return f"rank {self.rank}{f' at {self.where}' if self.where else ''}: {listed}"


@dataclass(frozen=True)
class Row:
    """A layout and what it takes.

    Attributes:
        candidate: the layout, its prediction, and its memory by the formula.
        group: the number of its group, from 1, of layouts that predictions cannot tell apart.
        peak: its memory, by a dry run where there was one.
        run_seconds: of all steps of the run.
        cost: of the run, in the currency of the price; None without one.
        parts: the seconds of a step by where they go, as `parts_of` returns them.
    """

    candidate: Candidate
    group: int
    peak: Peak
    run_seconds: float
    cost: float | None

    parts: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Return all of it; memory in bytes, shares of 1."""
        prediction, choice = self.candidate.prediction, self.candidate.choice
        return {
            "group": self.group,
            "choice": {KEYS[name]: value for name, value in to_jsonable(asdict(choice)).items()},
            "overrides": overrides_of(choice),
            "seconds": prediction.seconds,
            "parts": self.parts,
            "bubble": prediction.bubble,
            "tokens_per_second_per_gpu": prediction.tokens_per_second_per_gpu,
            "mfu": prediction.mfu,
            "mfu_whole_attention": prediction.mfu_whole_attention,
            "memory": {
                "rank": self.peak.rank,
                "peak": self.peak.num_bytes,
                "parts": dict(self.peak.parts),
                "at": self.peak.where,
                "dry_run": self.peak.where is not None,
                "formula": self.candidate.memory.peak,
            },
            "days": self.run_seconds / _DAY,
            "cost": self.cost,
        }


def parts_of(task: Task, choice: Choice, prediction: Prediction) -> dict[str, float]:
    """Return the seconds of a step by where they go; they add up to it.

    What is recomputed is told from what is computed for the first time by the prediction of a step that recomputes
    nothing, and so is no part of the kinds of operations.
    """
    first_time = prediction.compute
    if choice.recompute is not Recompute.none or choice.head_pieces > 1:
        without = replace(choice, recompute=Recompute.none, head_pieces=1)
        first_time = predict(task.job(without), task.cluster).compute
    return {
        **{_NAMES.get(kind, kind): seconds for kind, seconds in first_time.items()},
        "recomputed": sum(prediction.compute.values()) - sum(first_time.values()),
        **{f"exposed {kind}": seconds for kind, seconds in prediction.exposed.items()},
        "optimizer": prediction.optimizer,
        "bubble": prediction.waiting,
    }


def peak_by_formula(candidate: Candidate) -> Peak:
    """Return the memory of a candidate's fullest rank, by the formula."""
    return Peak(candidate.rank, asdict(candidate.memory))


def rows_of(
    request: Request, candidates: Sequence[Candidate], peaks: Mapping[Choice, Peak], top: int | None = None
) -> list[Row]:
    """Make the rows of the fastest of each pp, tp, dp and schedule.

    Args:
        request: what is planned.
        candidates: all of them, fastest first.
        peaks: the memory that dry runs have shown.
        top: the number of rows; None for all.
    """
    error = candidates[0].prediction.error if candidates else 0.0
    numbers = {one.choice: number for number, group in enumerate(groups(candidates, error), 1) for one in group}
    return [
        _row(request, one, numbers[one.choice], peaks.get(one.choice) or peak_by_formula(one))
        for one in fastest_of_each(candidates)[:top]
    ]


def _row(request: Request, candidate: Candidate, group: int, peak: Peak) -> Row:
    seconds = run_seconds(request, candidate)
    price = request.cluster.price_per_gpu_hour
    cost = None if price is None else seconds / _HOUR * price * request.cluster.world_size
    parts = parts_of(request.task, candidate.choice, candidate.prediction)
    return Row(candidate, group, peak, seconds, cost, parts)


def run_seconds(request: Request, candidate: Candidate) -> float:
    """Predict the seconds of all steps of the run, each with its own batch and length of sequences."""
    total, known = 0.0, {(request.task.global_batch, request.task.seq_len): candidate.seconds}
    for span in request.length.spans:
        size = span.first.global_batch, span.first.seq_len
        if size not in known:
            known[size] = predict(request.task_of(*size).job(candidate.choice), request.cluster).seconds
        total += span.count * known[size]
    return total


def as_json(request: Request, found: Found, rows: Sequence[Row]) -> dict[str, Any]:
    """Return a plan for `deepnarrow plan --json`.

    Its keys: cluster; task, with global_batch, seq_len, bf16 and gpus; kept, the keys that were not searched; search,
    with the numbers of choices that were tried, refused (by key), too_large, idle (that recompute more than they need)
    and timed; error, the relative error of predictions; and rows, the fastest of each pp, tp, dp and schedule, in the
    order of their seconds.
    """
    task = request.task
    return {
        "cluster": asdict(request.cluster),
        "task": {
            "global_batch": task.global_batch,
            "seq_len": task.seq_len,
            "bf16": task.bf16,
            "gpus": request.cluster.world_size,
        },
        "kept": {KEYS[name]: value for name, value in to_jsonable(request.fixed).items()},
        "search": {
            "tried": found.tried,
            "refused": dict(found.refused),
            "too_large": found.too_large,
            "idle": found.idle,
            "timed": len(found.candidates),
        },
        "error": rows[0].candidate.prediction.error if rows else None,
        "rows": [row.as_json() for row in rows],
    }
