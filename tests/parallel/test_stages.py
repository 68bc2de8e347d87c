import itertools

import pytest

from parallel.schedules import Schedule, placement_of
from parallel.stages import split, split_for, stage_rows, stage_table
from tests.shapes import preset


def cost_of(costs, stage):
    return sum(costs[stage.start : stage.stop])


@pytest.mark.parametrize("pp", [2, 4, 8, 16])
def test_the_7b_comes_out_even_with_its_head_weighing_two_layers(pp):
    model = preset("7b").model
    rows = stage_rows(model, split(model.layer_flops(4096), pp))
    assert [row["blocks"] for row in rows] == [32 // pp] * (pp - 1) + [32 // pp - 2]


@pytest.mark.parametrize("pp", [2, 3, 4, 6, 8, 12, 16])
def test_the_67b_comes_out_even_with_its_head_weighing_one_layer(pp):
    model = preset("67b").model
    rows = stage_rows(model, split(model.layer_flops(4096), pp))
    assert [row["blocks"] for row in rows] == [96 // pp] * (pp - 1) + [96 // pp - 1]


@pytest.mark.parametrize("seed", range(30))
def test_no_cut_beats_the_one_chosen(seed):
    import random

    draw = random.Random(seed)
    costs = [draw.choice([0.0, 0.3, 1.0, 1.0, 1.0, 2.5]) for _ in range(draw.randint(1, 9))]
    n = len(costs)
    for pp in range(1, n + 1):
        stages = split(costs, pp)
        assert [layer for s in stages for layer in range(s.start, s.stop)] == list(range(n))
        assert all(s.stop > s.start for s in stages)
        cuts = itertools.combinations(range(1, n), pp - 1)
        best = min(
            (max(sums), sum(x * x for x in sums))
            for cut in cuts
            for sums in [[sum(costs[a:b]) for a, b in itertools.pairwise([0, *cut, n])]]
        )
        sums = [cost_of(costs, s) for s in stages]
        assert (max(sums), sum(x * x for x in sums)) == pytest.approx(best, abs=1e-4)


def test_layers_are_never_dropped_where_they_do_not_divide():
    # 30 layers over 4 stages became 28 elsewhere
    model = preset("7b").model
    for pp in range(1, 31):
        rows = stage_rows(model, split(model.layer_flops(4096), pp))
        assert sum(row["blocks"] for row in rows) == 30
        assert sum(row["parameters"] for row in rows) == model.num_params
        assert sum(row["cost_share"] for row in rows) == pytest.approx(1)


def test_more_stages_than_layers_is_refused():
    with pytest.raises(ValueError, match="1 to 3 stages work"):
        split([1.0, 1.0, 1.0], 4)


def test_the_table_names_every_stage():
    model = preset("tiny").model
    text = stage_table(stage_rows(model, split(model.layer_flops(256), 2)))
    assert "embedding, blocks 0-4" in text and "blocks 5-7, head" in text


@pytest.mark.parametrize("schedule", ["interleaved", "zero_bubble", "zbv"])
@pytest.mark.parametrize(("name", "p", "v"), [("7b", 2, 2), ("7b", 4, 2), ("67b", 4, 2), ("67b", 8, 2), ("67b", 12, 3)])
def test_several_stages_of_a_rank_come_out_even_by_rank(schedule, name, p, v):
    place = placement_of(Schedule[schedule], p, 2 if schedule == "zbv" else v)
    costs = preset(name).model.layer_flops(4096)
    stages = split_for(costs, place)
    assert [stage.start for stage in stages[1:]] == [stage.stop for stage in stages[:-1]]
    assert stages[0].start == 0 and stages[-1].stop == len(costs)
    loads = [sum(stages[s].cost_share for s in place.stages_of(rank)) for rank in range(p)]
    assert sum(loads) == pytest.approx(1)
    assert max(loads) - min(loads) <= costs[1] / sum(costs) * 1.0001, "a block could be moved"


def test_the_head_on_the_first_rank_leaves_it_fewer_blocks():
    place = placement_of(Schedule["zbv"], 2, None)
    costs = [0, *[1] * 10, 2]  # 6 for each rank
    stages = split_for(costs, place)
    loads = [sum(sum(costs[stages[s].start : stages[s].stop]) for s in place.stages_of(rank)) for rank in range(2)]
    assert loads == [6, 6]
    assert [stage.stop - stage.start for stage in stages] == [4, 3, 3, 2]


def test_seven_layers_on_two_by_two_stages_and_too_few():
    place = placement_of(Schedule["interleaved"], 2, 2)
    stages = split_for([0, *[1] * 7, 1], place)
    assert [stage.stop - stage.start for stage in stages] == [3, 2, 2, 2]
    with pytest.raises(ValueError, match="4 layers cannot be cut into 6 stages"):
        split_for([0, 1, 1, 1], placement_of(Schedule["interleaved"], 2, 3))
