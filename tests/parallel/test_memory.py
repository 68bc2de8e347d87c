"""The memory that a formula gives a rank, against dry runs of it, which allocate what the rank would."""

import pytest

from model.config import ModelConfig
from parallel.dry_run import run
from parallel.engine import EngineSettings
from parallel.layer_memory import Step
from parallel.layout import Layout, Recompute
from parallel.memory import stage_memory
from parallel.plan.job import Job
from parallel.plan.search import fullest, rank_memory
from parallel.schedules import TABLE, Pass, Schedule, orders, placement_of
from parallel.simulation import held_messages

WAYS = list(Recompute)
SCHEDULES = [Schedule[name] for name in TABLE]
LAYOUTS = [(1, 4, 1), (2, 2, 1), (1, 2, 2)]
CASES = [
    (
        schedule,
        WAYS[(2 * at + turn) % len(WAYS)],
        LAYOUTS[(at + turn) % len(LAYOUTS)],
        (at + turn) % 2 == 0,
        1 + 3 * turn,
    )
    for at, schedule in enumerate(SCHEDULES)
    for turn in (0, 1)
]
"""Every schedule in two layouts; recomputations, precisions and pieces of the logits by turns."""


def job_of(schedule, recompute, layout, bf16, pieces, micro_batch=2, kv_heads=2, vocab=2000, cut=True):
    dp, pp, tp = layout
    model = ModelConfig(8, 256, 8, kv_heads, d_ff=688, vocab_size=vocab, max_seq_len=256)
    settings = EngineSettings(
        *(micro_batch, 2 * pp, 1.0, bf16, 1, 256, recompute, pieces, schedule, placement_of(schedule, pp, None))
    )
    return Job(model, Layout(dp, pp, tp, tp > 1 and cut), settings)


def runs(job):
    """A dry run of each rank of the first pipeline."""
    return [run(job, rank * job.layout.dp * job.layout.tp) for rank in range(job.layout.pp)]


@pytest.mark.parametrize(("schedule", "recompute", "layout", "bf16", "pieces"), CASES)
def test_every_rank_needs_what_a_dry_run_of_it_allocates(schedule, recompute, layout, bf16, pieces):
    job = job_of(schedule, recompute, layout, bf16, pieces)
    done = runs(job)
    for rank, found in enumerate(done):
        assert rank_memory(job, rank).peak == pytest.approx(found.peak, rel=0.03)
    assert fullest(job)[0] in {rank for rank, found in enumerate(done) if found.peak > 0.98 * max(d.peak for d in done)}


@pytest.mark.parametrize(
    "job",
    [
        job_of(SCHEDULES[0], Recompute.none, (1, 1, 4), True, 1),
        job_of(SCHEDULES[0], Recompute.selective, (1, 2, 2), False, 1, cut=False),
        job_of(SCHEDULES[0], Recompute.full, (1, 2, 1), True, 4, micro_batch=1, kv_heads=8, vocab=32_000),
        job_of(Schedule.zbv, Recompute.none, (1, 2, 2), True, 1, micro_batch=1, kv_heads=8, vocab=32_000),
    ],
)
def test_it_holds_without_a_pipeline_without_sequence_parallelism_and_with_a_head_of_the_size_of_blocks(job):
    for rank, found in enumerate(runs(job)):
        assert rank_memory(job, rank).peak == pytest.approx(found.peak, rel=0.03)


def test_the_state_is_that_of_the_buckets():
    job = job_of(SCHEDULES[0], Recompute.none, (2, 2, 1), True, 1)
    assert rank_memory(job, 0).state == pytest.approx(run(job, 0).state_bytes, rel=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_message_is_held_for_ever(schedule):
    placement = placement_of(schedule, 4, None)
    made = orders(schedule, placement, 24)
    counts = held_messages(made, placement)
    assert [len(of_rank) for of_rank in counts] == [len(order) for order in made]
    assert max(map(max, counts)) <= 12  # however many micro-batches there are
    assert all(count >= 1 for order, of_rank in zip(made, counts, strict=True)
               for action, count in zip(order, of_rank, strict=True)
               if action.what is Pass.B and action.stage < placement.num_stages - 1)  # fmt: skip


def test_a_longer_step_needs_no_more_but_for_its_token_ids():
    job = job_of(Schedule.zero_bubble, Recompute.none, (1, 4, 1), True, 1)
    settings, placement = job.settings, job.placement
    step = Step(settings.micro_batch, settings.seq_len, settings.bf16)
    peaks = []
    for micro_batches in (8, 32):
        made = orders(settings.schedule, placement, micro_batches)
        messages = held_messages(made, placement)
        found = stage_memory(job.model, job.layout, {2: job.stages[2]}, made[2], step, messages[2])
        peaks.append(found.peak - 2 * 8 * settings.micro_batch * settings.seq_len * micro_batches)
    assert peaks[0] == peaks[1]
