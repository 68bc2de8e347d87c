"""A search against trying everything by hand: on a space that is small enough, with a GPU that most of it overfills."""

from collections import Counter
from dataclasses import fields, replace
from itertools import product

import pytest

from parallel import layout, schedules
from parallel.layer_memory import Step
from parallel.layout import ParallelConfig, Recompute
from parallel.memory import Memory, stage_memory
from parallel.plan.cluster import Cluster
from parallel.plan.job import Job
from parallel.plan.predict import predict
from parallel.plan.search import (
    Choice,
    Task,
    fastest_of_each,
    first_fitting,
    fullest,
    groups,
    rank_memory,
    search,
    space_for,
)
from parallel.schedules import TABLE, Schedule, orders
from parallel.simulation import held_messages
from tests.shapes import small

MODEL = small(n_layers=10, vocab_size=4000, d_model=256, d_ff=688, max_seq_len=512)
BATCH, LENGTH = 40, 512
MIB = 1 / 1024
CLUSTER = Cluster("small", nodes=1, gpus_per_node=4, memory_gib=110 * MIB, reserved_gib=20 * MIB)
TASK = Task(MODEL, CLUSTER, BATCH, LENGTH)
SPACE = replace(
    space_for(CLUSTER, MODEL, LENGTH, {}), micro_batch=[1, 2, 4], head_pieces=[1, 4], virtual_stages=[1, 2, 3]
)


def problems(choice: Choice) -> list[str]:
    """What the run's own checks say of a choice, the batch included."""
    parallel = ParallelConfig(
        **{name.name: getattr(choice, name.name) for name in fields(Choice) if name.name != "micro_batch"}
    )
    found = layout.problems(parallel, MODEL)
    if BATCH % (choice.micro_batch * choice.dp):
        return [*found, "train.global_batch=40: does not divide"]
    sequences = choice.micro_batch * choice.dp
    return found or schedules.batch_problems(choice.schedule, choice.pp, BATCH, sequences)


def peak_by_hand(choice: Choice) -> float:
    """The memory of the fullest of all ranks, in a step with all of its micro-batches."""
    return max(one.peak for one in memory_by_hand(TASK.job(choice)))


def memory_by_hand(job: Job) -> list[Memory]:
    """The memory of every rank of the pipeline in a whole step."""
    settings, placement = job.settings, job.placement
    step = Step(settings.micro_batch, LENGTH, True, settings.recompute, settings.head_pieces)
    made = orders(settings.schedule, placement, settings.accumulation)
    messages = held_messages(made, placement)
    return [
        stage_memory(job.model, job.layout, {i: job.stages[i] for i in placement.stages_of(rank)}, order, step, held)
        for rank, (order, held) in enumerate(zip(made, messages, strict=True))
    ]


@pytest.fixture(scope="module")
def found():
    return search(TASK, SPACE, problems, predict)


@pytest.fixture(scope="module")
def by_hand():
    """Every choice of the space that would run and fits, and the numbers of the others."""
    fitting, numbers = [], Counter()
    degrees = [(pp, tp, 4 // pp // tp) for pp, tp in product((1, 2, 4), repeat=2) if 4 % (pp * tp) == 0]
    for (pp, tp, dp), name, virtual, size, recompute, pieces in product(
        degrees, TABLE, (1, 2, 3), (1, 2, 4), Recompute, (1, 4)
    ):
        least, most = TABLE[name].virtual_stages
        if (name, virtual) != ("1f1b", 1) if pp == 1 else not least <= virtual <= (most or virtual):
            continue
        choice = Choice(pp, tp, dp, Schedule[name], virtual, size, recompute, pieces)
        if problems(choice):
            numbers["refused"] += 1
        elif peak_by_hand(choice) > CLUSTER.allocatable_gib * 2**30:
            numbers["too large"] += 1
        else:
            fitting.append(choice)
    return fitting, numbers


def test_the_first_is_the_fastest_of_all_that_run_and_fit(found, by_hand):
    fitting, _ = by_hand
    seconds = {choice: predict(TASK.job(choice), CLUSTER).seconds for choice in fitting}
    first = found.candidates[0]
    assert first.seconds == min(seconds.values()) == seconds[first.choice]
    assert {one.choice for one in found.candidates} <= set(fitting)
    assert [one.seconds for one in found.candidates] == sorted(one.seconds for one in found.candidates)
    # The space tells layouts apart: the worst of them takes far longer, and some fit by recomputation alone.
    assert max(seconds.values()) > 1.5 * first.seconds
    assert {one.choice.recompute for one in found.candidates} > {Recompute.none}


def test_only_what_recomputes_more_than_it_needs_is_left_out(found, by_hand):
    fitting, kept = by_hand[0], {one.choice: one.seconds for one in found.candidates}
    for choice in fitting:
        alike = [other for other in fitting if _layout(other) == _layout(choice) and other != choice]
        less = [other for other in alike if _recomputes(other) <= _recomputes(choice)]
        less = [other for other in less if other.head_pieces <= choice.head_pieces]
        assert (choice in kept) == (not less), choice
        if less:
            assert min(kept.get(one, 1e9) for one in alike) <= predict(TASK.job(choice), CLUSTER).seconds
    by_layout = Counter(_layout(one) for one in kept)
    assert max(by_layout.values()) > 1  # fewer pieces and more recomputation, or the other way round


def _recomputes(choice: Choice) -> int:
    return list(Recompute).index(choice.recompute)


def _layout(choice: Choice) -> Choice:
    return replace(choice, recompute=Recompute.none, head_pieces=1)


def test_every_choice_is_counted_once(found, by_hand):
    fitting, numbers = by_hand
    assert found.refused.total() == numbers["refused"] > 0
    assert found.too_large == numbers["too large"] > 0
    assert found.idle + len(found.candidates) == len(fitting)
    assert found.tried == len(fitting) + numbers.total()
    assert all(found.examples[key].startswith(key) for key in found.refused)


def test_the_fullest_rank_is_that_of_a_whole_step(found):
    for one in found.candidates:
        rank, memory = fullest(one.job)
        assert (rank, memory) == (one.rank, one.memory) and memory.peak == peak_by_hand(one.choice)


@pytest.mark.parametrize("name", list(TABLE))
def test_a_pipeline_is_full_after_three_times_as_many_micro_batches_as_ranks(name):
    least, most = TABLE[name].virtual_stages
    for pp, virtual in product((2, 3, 4), range(least, (most or 3) + 1)):
        task = replace(TASK, model=replace(MODEL, n_layers=pp * virtual), global_batch=7 * pp)
        job = task.job(Choice(pp, 1, 1, Schedule[name], virtual, 1))
        found = [rank_memory(job, rank) for rank in range(pp)]
        assert found == memory_by_hand(job)
        # Token ids are there from the first micro-batch to the last.
        shorter = replace(job, settings=replace(job.settings, accumulation=3 * pp))
        ids = [one.peak - other.peak for one, other in zip(found, memory_by_hand(shorter), strict=True)]
        assert ids == [4 * pp * LENGTH * 2 * 8] * pp


def test_keys_that_are_fixed_stay_so_and_all_gpus_are_used():
    assert set(_values("tp", {"tp": 2})) == {2}
    assert set(_values("dp", {"dp": 2})) == {2} and set(_values("dp", {})) == {1, 2, 4}
    assert set(_values("schedule", {"schedule": Schedule["zbv"]})) == {Schedule["zbv"]}
    assert set(_values("recompute", {"recompute": Recompute.full})) == {Recompute.full}
    assert set(_values("head_pieces", {"head_pieces": 3})) == {3}
    assert set(_values("micro_batch", {"micro_batch": 6})) == {6}
    assert set(_values("virtual_stages", {"virtual_stages": 2})) == {2}
    assert not _values("pp", {"pp": 3})  # of four GPUs
    for choice in space_for(CLUSTER, MODEL, LENGTH, {"pp": 2}).layouts():
        assert choice.pp * choice.tp * choice.dp == CLUSTER.world_size


def _values(name, fixed):
    return [getattr(choice, name) for choice in space_for(CLUSTER, MODEL, LENGTH, fixed).layouts()]


def test_tensor_parallelism_stays_within_a_machine():
    wide = space_for(Cluster(nodes=4, gpus_per_node=6), MODEL, LENGTH, {})
    assert {choice.tp for choice in wide.layouts()} == {1, 2, 3, 6}  # 4 and 8 divide the 24 GPUs as well
    assert {choice.pp for choice in wide.layouts()} == {1, 2, 3, 4, 6, 8}  # of the 10 blocks


def test_where_nothing_fits_the_least_is_told():
    tiny = replace(TASK, cluster=replace(CLUSTER, memory_gib=30 * MIB))
    found = search(tiny, SPACE, problems, predict)
    assert found.candidates == [] and found.least is not None
    choice, rank, memory = found.least
    assert memory.peak == rank_memory(tiny.job(choice), rank).peak > 10 * 2**20
    assert first_fitting(tiny, SPACE, problems) is None
    first = first_fitting(TASK, SPACE, problems)
    assert first is not None and peak_by_hand(first) <= CLUSTER.allocatable_gib * 2**30


def test_groups_are_what_a_prediction_cannot_tell_apart(found):
    made = groups(found.candidates, 0.1)
    assert [one for group in made for one in group] == found.candidates and len(made) > 1
    for group, then in zip(made, [*made[1:], []], strict=True):
        assert group[-1].seconds <= 1.1 * group[0].seconds
        assert not then or then[0].seconds > 1.1 * group[0].seconds
    fastest = fastest_of_each(found.candidates)
    assert fastest[0] is found.candidates[0]
    kinds = [(one.choice.pp, one.choice.tp, one.choice.dp, one.choice.schedule) for one in fastest]
    assert len(set(kinds)) == len(kinds) and len(kinds) > 5
