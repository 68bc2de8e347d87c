"""The quick simulation of a step against the one that everything else uses, and long steps against short ones."""

import pytest

from parallel.plan.costs import PassTime
from parallel.plan.steps import Exchange, RankTime, StageTime, Step, _passes, step_time
from parallel.schedules import Schedule, orders, placement_of
from parallel.simulation import Costs, simulate

KINDS = [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1), ("zero_bubble", 2), ("zbv", 2), ("dualpipev", 2)]


def stage(forward, backward, weights):
    return StageTime(*(PassTime(products=one) for one in (forward, backward + weights, backward, weights)))


def step(name, virtual, ranks, micro_batches, uneven=0.0, link=0.0, around=(), overlap=True):
    """A step whose stages take 1 forward, 1.1 and 0.9 backward, the last one more and those in the middle others."""
    placement = placement_of(Schedule[name], ranks, virtual)
    number = placement.num_stages
    factors = [1 + uneven * ((at * 7) % 5) / 5 + 2 * uneven * (at == number - 1) for at in range(number)]
    stages = [stage(1.0 * one, 1.1 * one, 0.9 * one) for one in factors]
    ranks_time = list(around) or [RankTime()] * ranks
    return Step(Schedule[name], placement, micro_batches, stages, [link] * (number - 1), ranks_time, 0.0, overlap)


@pytest.mark.parametrize("link", [0.0, 0.3])
@pytest.mark.parametrize(("name", "virtual"), KINDS)
def test_it_is_the_simulation_of_the_schedule(name, virtual, link):
    one = step(name, virtual, 4, 12, 0.2, link)
    forward, _, backward, weights = ([time.seconds for time in kind] for kind in zip(*one.stages, strict=True))
    made = orders(one.schedule, one.placement, one.micro_batches)
    simulated = simulate(made, one.placement, Costs(forward, backward, weights, link))
    found = step_time(one)
    assert found.seconds == pytest.approx(simulated.seconds, rel=1e-12)
    without = simulate(made, one.placement, Costs(forward, backward, weights))
    assert found.waiting == pytest.approx(without.bubble * without.seconds)
    assert found.pp == pytest.approx(simulated.seconds - without.seconds)


@pytest.mark.parametrize("uneven", [0.0, 0.2])
@pytest.mark.parametrize(("name", "virtual"), KINDS)
def test_a_long_step_is_that_of_a_whole_simulation(name, virtual, uneven):
    """The whole step is simulated pass by pass here, and extrapolated from short ones there."""
    for ranks, micro_batches in ((4, 200), (6, 150)):
        one = step(name, virtual, ranks, micro_batches, uneven, 0.05)
        passes = _passes(one.schedule, one.placement, micro_batches)
        whole = passes.run(one.stages, one.links, one.ranks, True)
        found = step_time(one)
        assert found.seconds == pytest.approx(whole, rel=1e-9)
        assert found.products * ranks == pytest.approx(
            sum(number * time.seconds for number, time in zip(
                passes.number, (time for stage in one.stages for time in stage), strict=True)), rel=1e-12
        )  # fmt: skip


@pytest.mark.parametrize(("name", "virtual"), KINDS)
def test_a_rank_that_falls_behind_slowly_is_not_missed(name, virtual):
    """Some stage in the middle is 2 % slower than the others, which only a long step shows."""
    for slow in range(4 * virtual):
        one = step(name, virtual, 4, 160, link=0.05)
        one.stages[slow] = stage(1.02, 1.02 * 1.1, 1.02 * 0.9)
        whole = _passes(one.schedule, one.placement, 160).run(one.stages, one.links, one.ranks, True)
        assert step_time(one).seconds == pytest.approx(whole, rel=2e-3)


@pytest.mark.parametrize(("name", "virtual"), KINDS)
def test_the_parts_add_up_to_the_seconds(name, virtual):
    exchanges = (Exchange(0.4, 0.2, (0, 1.0), ((0, 0.5),)),)
    around = [RankTime(exchanges, after=0.01, optimizer=0.1)] + [RankTime((), 0.01, 0.1)] * 3
    found = step_time(step(name, virtual, 4, 16, 0.1, 0.1, around))
    assert sum(found[1:]) == pytest.approx(found.seconds, rel=1e-12)
    assert found.optimizer == pytest.approx(0.1)


def test_weights_are_waited_for_and_gradients_reduced_beside_passes():
    """One rank, four micro-batches of 1 forward and 2 backward, and four exchanges of a quarter of the layers each."""
    quarters = tuple(
        Exchange(reduce=0.6, gather=0.2, used=(0, 1 - at / 4), ready=((0, 2 * at / 4),)) for at in range(4)
    )
    alone = step("1f1b", 1, 1, 4)
    assert step_time(alone).seconds == pytest.approx(12)
    beside = step("1f1b", 1, 1, 4, around=[RankTime(quarters)])
    # The first quarter's weights are there after 0.2, from when on each is there before it is needed. Of the gradients,
    # the last quarter's are ready 1.5 before the end; each takes 0.6, one after another: 2.4, of which 1.5 are hidden.
    assert step_time(beside).seconds == pytest.approx(0.2 + 12 + 2.4 - 1.5)
    after = step("1f1b", 1, 1, 4, around=[RankTime(quarters)], overlap=False)
    assert step_time(after).seconds == pytest.approx(0.8 + 12 + 2.4)
    slow = [RankTime(tuple(one._replace(gather=2.0) for one in quarters))]
    # All weights are there after 8, and the last quarter of the first pass follows.
    assert step_time(step("1f1b", 1, 1, 4, around=slow)).seconds == pytest.approx(8.25 + 11 + 2.4 - 1.5)
