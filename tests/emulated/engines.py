"""Whole engines, each rank by itself: what it says in two steps with an evaluation, scores of requests, a copy of its
state and some decoding between.

A main of `tests.ranks`: a few processes share out the ranks of every job, which they are one after another.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import torch

from conf.train_settings import OptimizerConfig
from model.batch import Batch
from model.config import ModelConfig
from parallel.engine import Engine, EngineSettings, build_engine
from parallel.layout import Layout
from parallel.schedules import Placement, Schedule, placement_of
from parallel.scoring import Request
from parallel.stages import split_for
from parallel.state import OptimizerState
from tests.emulated.alone import one_of_many
from tests.ranks import report
from train.optimizer import adamw

SEQ_LEN, RATE = 16, 1e-3
PHASES = ("building", "first step", "evaluation", "scores", "save", "decoding", "second step")
REQUESTS = [Request([1 + number % 9] * (SEQ_LEN - number % 12), 1) for number in range(100)]
"""Documents of several lengths, of which the shorter are the beginnings of longer ones."""


@dataclass(frozen=True)
class Job:
    """A layout, a schedule, and a model that is small but for its layers and heads."""

    dp: int
    pp: int
    tp: int
    schedule: str = "1f1b"
    kv_heads: int = 2
    """As on large models, fewer than tensor-parallel ranks where these are many."""

    @property
    def layout(self) -> Layout:
        """With sequence parallelism."""
        return Layout(self.dp, self.pp, self.tp, sequence_parallel=self.tp > 1)

    @property
    def placement(self) -> Placement:
        """As the schedule has it."""
        return placement_of(Schedule[self.schedule], self.pp, None)

    @property
    def micro_batches(self) -> int:
        """Of a step, and of an evaluation."""
        return 2 * self.pp

    def build(self, device: torch.device | None = None) -> Engine:
        """This rank's engine; its buckets are many, as a large model's are."""
        heads = max(4, self.tp)
        layers = max(4, self.placement.num_stages)
        model = ModelConfig(layers, 8 * heads, heads, self.kv_heads, d_ff=32, vocab_size=64, max_seq_len=SEQ_LEN)
        settings = EngineSettings(
            *[1, self.micro_batches, 1.0, True, 1, SEQ_LEN],
            schedule=Schedule[self.schedule],
            placement=self.placement,
            bucket=2000,
        )
        stages = split_for(model.layer_flops(SEQ_LEN), self.placement)
        make_optimizer = partial(adamw, settings=OptimizerConfig())
        return build_engine(model, self.layout, stages, settings, make_optimizer, device)


JOBS = [
    *[Job(2, 2, 2, "1f1b"), Job(2, 2, 2, "zbv"), Job(1, 4, 2, "1f1b"), Job(1, 4, 2, "zbv")],
    *[Job(2, 4, 1, "1f1b"), Job(2, 4, 1, "zero_bubble"), Job(1, 2, 4, "zero_bubble")],
]
"""Of eight ranks each; in the last one pairs of tensor-parallel ranks share a key/value head."""


def batches() -> Iterator[Batch]:
    """Micro-batches without end."""
    tokens = torch.zeros(1, SEQ_LEN, dtype=torch.int64)
    return repeat(Batch(tokens, tokens))


def said_by(job: Job, rank: int) -> dict[str, Any]:
    """What a rank of a job says: its notes, and the number of the note at which each of `PHASES` begins."""
    data = batches()
    with one_of_many(rank, job.layout.world_size) as said:
        begins = [0]
        engine = job.build()
        begins.append(len(said.notes))
        engine.step(data, RATE)
        begins.append(len(said.notes))
        engine.evaluate(data, job.micro_batches)
        begins.append(len(said.notes))
        engine.score(REQUESTS)
        begins.append(len(said.notes))
        copied = [{key: flat.clone() for key, flat in flats.items()} for flats in OptimizerState(engine.zero).flats()]
        assert copied, "a rank without state"
        begins.append(len(said.notes))
        with engine.decoder([[1, 2, 3], [4]], room=8) as decoder:
            decoder.prefill()
            decoder.step(torch.zeros(2, dtype=torch.int64))
        begins.append(len(said.notes))
        engine.step(data, RATE)
        return {"notes": said.notes, "begins": dict(zip(PHASES, begins, strict=True))}


def main() -> list[dict[int, dict[str, Any]]]:
    """For each job what its ranks say, as far as they are this process's share."""
    mine, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return [{rank: said_by(job, rank) for rank in range(mine, job.layout.world_size, processes)} for job in JOBS]


if __name__ == "__main__":
    report(main)
