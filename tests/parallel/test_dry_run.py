"""Dry runs against ranks that run over gloo, storage for storage, and what they say of messages, FLOPs and kinds."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from model.config import Kernels
from parallel import pipeline, tensor
from parallel.dry_run import enough_micro_batches, run
from parallel.dry_run.distinct import alone, classes
from parallel.dry_run.matching import match
from parallel.dry_run.storages import Kind
from parallel.engine import EngineSettings
from parallel.layout import Layout, Recompute
from parallel.plan.job import Job
from parallel.plan.operations import Attention, Message, Product, Wait
from parallel.schedules import TABLE, Schedule, placement_of
from tests.parallel.dry_runs import CASES
from tests.ranks import run_ranks
from tests.shapes import small


def job(schedule="1f1b", pp=2, tp=1, dp=1, accumulation=None, recompute="none", head_pieces=1, **shape):
    """A small job with compiled kernels, as a GPU runs it."""
    settings = EngineSettings(
        *(1, accumulation or 2 * pp, 1.0, True, 1, 64, Recompute[recompute], head_pieces),
        schedule=Schedule[schedule],
        placement=placement_of(Schedule[schedule], pp, None),
        bucket=20_000,
    )
    shape = {"n_heads": 8, "n_layers": max(2, 2 * pp - 2), "vocab_size": 512, **shape}
    return Job(small(shape.pop("kv_heads", 2), **shape), Layout(dp, pp, tp, tp > 1), settings)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of four ranks reported of each case."""
    return run_ranks("tests.parallel.dry_runs", 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_every_section_holds_to_the_byte_what_it_holds_over_gloo(ranks, index):
    for rank in ranks:
        found = rank[index]
        assert len(found["names"]) > 2
        assert dict(zip(found["names"], found["dry"], strict=True)) == dict(
            zip(found["names"], found["real"], strict=True)
        )


@pytest.mark.parametrize("schedule", TABLE)
def test_a_few_micro_batches_show_what_a_long_step_holds(schedule):
    long = job(schedule, pp=2, accumulation=10)
    assert enough_micro_batches(long) == 6
    for rank in (0, 1):
        few, all_of_them = run(long, rank), run(long, rank, micro_batches=10)
        assert few.peak == all_of_them.peak and few.flops == all_of_them.flops
        assert few.peak_by_kind == all_of_them.peak_by_kind
        assert few.kept == 2 * 512 * (1 + (long.placement.loss_rank == rank)) == all_of_them.kept


def test_documents_hold_the_same_and_attend_to_less():
    whole, apart = run(job(), 0), run(job(), 0, document=16)
    ids = 64 * 8 + 512  # positions and borders of a micro-batch
    assert 0 < apart.peak - whole.peak <= ids * whole.micro_batches
    of_whole, of_apart = (
        [op for section in one.sections for op in section.operations if isinstance(op, Attention)]
        for one in (whole, apart)
    )
    assert {(op.batch, op.length) for op in of_apart} == {(4, 16)}
    assert sum(op.flops for op in of_apart) == sum(op.flops for op in of_whole) / 4


def test_kinds_are_what_they_are_called():
    found = run(job(pp=2, tp=2, recompute="selective"), 3)
    state = found.state
    assert state[Kind.gradients] == 2 * state[Kind.weights]  # fp32 and bf16
    assert 6 * state[Kind.weights] <= state[Kind.optimizer] < 6.1 * state[Kind.weights]
    of_forward = next(section for section in found.sections if section.name == "F stage 1 micro-batch 0")
    logits = [section.held.by_kind[Kind.logits] for section in found.sections]
    assert of_forward.held.by_kind[Kind.logits] == max(logits) == 64 * 512 // 2 * 2
    message = 32 * 64 * 2  # this rank's part of a sequence in bf16
    passing = [section.held.by_kind[Kind.passing] for section in found.sections]
    assert not any(size % message for size in passing)
    assert of_forward.held.by_kind[Kind.passing] >= message  # what the stage before has sent
    assert run(job(pp=1), 0).peak_by_kind[Kind.passing] == 0


def test_kernels_hold_their_results_alone():
    compiled, plain = (run(job(pp=1, kernels=kernels), 0) for kernels in (Kernels.auto, Kernels.plain))
    assert compiled.peak < plain.peak
    assert compiled.flops == plain.flops


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_products_of_a_replica_are_those_of_the_model(recompute):
    one = job("zbv", pp=2, tp=2, recompute=recompute)
    runs = [run(one, rank) for rank in range(4)]
    products = sum(op.flops for found in runs for section in found.sections for op in section.operations
                   if isinstance(op, Product))  # fmt: skip
    blocks = one.model.flops_per_token(0) - 3 * one.model.head_flops
    again = blocks / 3 if recompute == "full" else 0
    assert products == (one.model.flops_per_token(0) + again) * 64 * runs[0].micro_batches
    assert sum(found.flops for found in runs) > products


def test_a_wait_names_a_message_of_its_step_or_of_the_step_before():
    found = run(job(pp=2, tp=2, dp=2), 0)
    done = [op for section in found.sections for op in section.operations]
    begun = {op.index: (op, place) for place, op in enumerate(done) if isinstance(op, Message) and op.index >= 0}
    waits = [(op.index, place) for place, op in enumerate(done) if isinstance(op, Wait)]
    assert sorted(index for index, _ in waits) == sorted(begun)
    of_the_step_before = {begun[index][0].operation for index, place in waits if place < begun[index][1]}
    assert of_the_step_before == {"all_gather"}  # of weights, which the first forward pass waits for
    assert len(found.exchanges) == sum(isinstance(op, Message) for op in done)


# ---- messages ----


def run_each(one, which, broken=None, change=nullcontext):
    """The runs of these ranks; one of them under a change of the code."""
    found = {}
    for rank in which:
        with change() if rank.rank == broken else nullcontext():
            found[rank] = run(one, rank.rank)
    return found


@pytest.mark.parametrize("schedule", TABLE)
def test_the_messages_of_all_ranks_pair_up(schedule):
    one = job(schedule, pp=2, tp=4, n_layers=6)  # two tensor-parallel ranks share a key/value head
    every, distinct = [alone(one, rank) for rank in range(8)], classes(one)
    runs = run_each(one, every)
    assert [rank.tp_ranks for rank in distinct] == 2 * [(0,), (1, 3), (2,)] and sum(rank.size for rank in distinct) == 8
    of_all = match(one, runs)
    of_some = match(one, {rank: runs[every[rank.rank]] for rank in distinct})
    assert not of_all.problems and not of_all.unchecked and of_all.messages > 100
    assert of_some == replace(of_all, ranks_run=len(distinct))


def test_ranks_that_do_the_same_are_run_once():
    one = job("interleaved", pp=2, tp=4, dp=3, vocab_size=509)  # whose last rank has fewer tokens
    distinct = classes(one)
    assert sum(rank.size for rank in distinct) == 24
    assert {(rank.pp_rank, rank.tp_ranks) for rank in distinct} == {
        *{(stage, tp_ranks) for stage in (0, 1) for tp_ranks in ((0,), (1,), (2,), (3,))}
    }
    stands_for = next(rank for rank in distinct if rank.tp_ranks == (2,) and rank.pp_rank == 1)
    found, other = run(one, stands_for.rank), run(one, stands_for.rank + 4)
    assert [section.held for section in found.sections] == [section.held for section in other.sections]
    assert [section.operations for section in found.sections] == [section.operations for section in other.sections]


@contextmanager
def two_asked_for_in_the_other_order():
    """Of what a rank asks for, the second before the first."""
    real = pipeline.programs

    def changed(orders, placement):
        found = real(orders, placement)
        for program in found:
            places = [place for place, awaited in enumerate(program.receives) if awaited]
            if len(places) > 1:
                first, second = places[:2]
                program.receives[first] = program.receives[second] + program.receives[first]
                program.receives[second] = []
        return found

    with mock.patch.object(pipeline, "programs", changed):
        yield


@contextmanager
def a_gather_left_out():
    """One of the gathers of the backward pass, whose result is made up."""
    real, left = tensor._start_gather, [None] * 30

    def start(x, tp):
        if left:
            left.pop()
            return real(x, tp)
        return x.new_empty(tp.size * x.shape[0], *x.shape[1:]), SimpleNamespace(wait=lambda: None)

    with mock.patch.object(tensor, "_start_gather", start):
        yield


@contextmanager
def in_another_precision():
    with mock.patch.object(EngineSettings, "dtype", property(lambda self: torch.float32)):
        yield


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (two_asked_for_in_the_other_order, "from rank 0 to rank 2: message 0 is F stage 0 micro-batch 0 4,096 bytes"),
        (a_gather_left_out, "tp of 2: message"),
        (in_another_precision, "8,192 bytes float32 on rank 2"),
    ],
)
def test_a_rank_that_does_otherwise_is_found(change, said):
    one = job(pp=2, tp=2)
    found = match(one, run_each(one, [alone(one, rank) for rank in range(4)], broken=2, change=change))
    assert any(said in problem and "on rank 2" in problem for problem in found.problems), found.problems


def test_a_group_of_other_ranks_is_found():
    one = job(pp=1, tp=2, dp=2)
    found = run_each(one, [alone(one, rank) for rank in range(4)])
    first = next(iter(found))
    moved = [replace(each, group=(0, 3)) if tuple(each.group) == (0, 2) else each for each in found[first].exchanges]
    found[first] = replace(found[first], exchanges=moved)
    assert match(one, found).problems == [
        f"rank 0: speaks to ranks 0, 3, which are no group of {one.layout} that it is in"
    ]


def test_groups_of_ranks_that_were_not_run_are_counted():
    one = job(pp=2, tp=2, dp=2)
    found = match(one, run_each(one, [alone(one, rank) for rank in (0, 1)]))
    # Their tensor-parallel group is one of four; four of replicas, eight links and the world have others.
    assert (found.groups, found.unchecked) == (1, 3 + 4 + 8 + 1) and not found.problems
