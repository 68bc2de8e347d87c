"""Steps of ranks that share devices: what a scheduler's fair share makes of work that can be summed by hand."""

from dataclasses import replace

import pytest

from parallel.layout import Layout
from parallel.plan.cluster import Cluster
from parallel.plan.costs import PassTime, Prices, pass_time, reaches
from parallel.plan.operations import GroupKind, Message, Product, Wait
from parallel.plan.shared import shared_step_time
from parallel.plan.steps import Exchange, RankTime, StageTime, Step, step_time
from parallel.schedules import TABLE, Schedule, placement_of

F, B, W = 1.0, 1.5, 0.5
M = 8
EXCHANGE = Exchange(0.7, 0.4, (0, 1.0), ((0, 0.0),))


def stage(times=1.0, exposed=0.0):
    forward = PassTime(products=times * F, exposed=exposed)
    whole = PassTime(products=times * (B + W), exposed=exposed)
    return StageTime(forward, whole, PassTime(products=times * B, exposed=exposed), PassTime(products=times * W))


def step(name="1f1b", ranks=2, micro_batches=M, links=0.0, exposed=0.0, around=RankTime()):  # noqa: B008 - frozen
    schedule = Schedule[name]
    placement = placement_of(schedule, ranks, None)
    stages = [stage(1 + index / 10, exposed) for index in range(placement.num_stages)]
    links = [links] * (placement.num_stages - 1)
    return Step(schedule, placement, micro_batches, stages, links, [around] * ranks, 0.25, overlap=False)


@pytest.mark.parametrize("name", list(TABLE))
@pytest.mark.parametrize("around", [RankTime(), RankTime((EXCHANGE, EXCHANGE), 0.3, 0.2)], ids=["alone", "replicas"])
def test_ranks_with_a_device_each_take_as_long_as_without_sharing(name, around):
    one = step(name, ranks=4, links=0.05, exposed=0.1, around=around)
    shared, own = shared_step_time(one, copies=2, devices=8), step_time(one)
    assert shared._asdict() == pytest.approx(own._asdict())


@pytest.mark.parametrize("name", list(TABLE))
def test_one_device_does_the_work_of_all_ranks_one_after_another(name):
    one = step(name, around=RankTime((), 0.3, 0.2))
    work = sum(M * (F + B + W) * (1 + index / 10) for index in range(one.placement.num_stages))
    found = shared_step_time(one, copies=1, devices=1)
    assert found.seconds == pytest.approx(work + 2 * (0.3 + 0.2) + 0.25)


def test_a_rank_that_others_wait_for_has_the_device_to_itself():
    one = step(micro_batches=1)  # of two ranks, one computes at a time
    assert shared_step_time(one, 1, 1).seconds == pytest.approx(shared_step_time(one, 1, 2).seconds)


def test_two_ranks_on_a_device_and_a_half_each_have_three_quarters_while_both_compute():
    work = [RankTime((), 0.0, 3.0), RankTime((), 0.0, 6.0)]
    one = replace(step(micro_batches=1), stages=[stage(0.0), stage(0.0)], ranks=work)
    # Both have 3 to do, which takes 4; the second has 3 more, alone on a device.
    assert shared_step_time(one, 1, 1.5).seconds == pytest.approx(4.0 + 3.0 + 0.25)


def test_a_device_is_faster_while_others_rest():
    one = step(micro_batches=1)  # of two ranks, one computes at a time
    alone = shared_step_time(one, 1, 2, crowded_share=0.8).seconds
    assert alone - one.agreement == pytest.approx(0.8 * (shared_step_time(one, 1, 2).seconds - one.agreement))
    # All compute all the time: nobody is faster.
    work = replace(step(micro_batches=1), stages=[stage(0.0), stage(0.0)], ranks=[RankTime((), 0.0, 3.0)] * 2)
    assert shared_step_time(work, 2, 4, 0.8).seconds == pytest.approx(3.0 + work.agreement)
    # Of four devices two are used: of what a device gains alone, by three that rest, two bring two thirds.
    assert shared_step_time(work, 1, 4, 0.8).seconds == pytest.approx(3.0 / (1 + 0.25 * 2 / 3) + work.agreement)


def test_copies_share_as_ranks_do():
    one = step(ranks=4)
    assert shared_step_time(one, 2, 4).seconds == pytest.approx(shared_step_time(one, 1, 2).seconds)
    assert shared_step_time(one, 2, 4).seconds > 1.3 * shared_step_time(one, 1, 4).seconds


def test_messages_leave_the_device_to_others():
    one = step(exposed=0.5)
    bare, passes = shared_step_time(step(), 1, 1).seconds, 2 * M
    assert bare < shared_step_time(one, 1, 1).seconds < bare + passes * 0.5  # of each rank
    assert shared_step_time(one, 1, 2).tp == pytest.approx(passes * 0.5)


def test_messages_run_beside_computation_on_gpus_and_take_a_cores_time():
    message = Message("all_gather", GroupKind.tp, 2, 2**24, index=1)
    operations = [message, Product(1024, 1024, 1024, bytes_per_value=4), Wait(1)]
    figures = {"gpus_per_node": 2, "peak_fp32_tflops": 0.1, "intra_gb_per_s": 1.0, "tile_units": 0}
    where = reaches(Layout(1, 1, 2), 2)
    gpus, cores = (Prices(Cluster(**figures, devices_per_node=devices), 4) for devices in (None, 2.0))
    sent, computed = gpus.message("all_gather", 2**24, where[GroupKind.tp]), gpus.product(operations[1])
    assert max(sent, computed) <= pass_time(operations, gpus, where).seconds < 1.1 * max(sent, computed)
    assert pass_time(operations, cores, where).seconds == pytest.approx(sent + computed)


def test_the_parts_add_up():
    one = step("zbv", 4, links=0.05, exposed=0.1, around=RankTime((EXCHANGE,), 0.3, 0.2))
    found = shared_step_time(one, 1, 2)
    assert sum(found[1:]) == pytest.approx(found.seconds)
    assert found.products == pytest.approx(M * (F + B + W) * sum(1 + index / 10 for index in range(8)) / 4)


def test_a_step_of_hours_comes_to_its_end():
    slow = replace(step(), stages=[stage(4000.0), stage(4400.0)], agreement=0.0)
    quick = replace(step(), stages=[stage(4.0), stage(4.4)], agreement=0.0)
    assert shared_step_time(slow, 1, 1).seconds == pytest.approx(1000 * shared_step_time(quick, 1, 1).seconds)
