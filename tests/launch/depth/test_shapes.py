"""Shapes have the cost and the aspect that are wanted as nearly as whole numbers can, of small and of large presets."""

from fractions import Fraction

import pytest

from launch.depth.pipelines import pipeline_of
from launch.depth.settings import ASPECTS, Equal
from launch.depth.shapes import MOST, MOST_ASPECT, NEAR, cost_of, nearest_shape, of_size, score_of, shapes_of
from model.config import ModelConfig
from parallel.layout import ParallelConfig
from tests.shapes import preset


def searched(base, equal, aspect, seq_len):
    """The nearest shape of all there are."""
    wanted, found = cost_of(equal, base, seq_len), []
    for heads in range(1, 41):
        for n_layers in range(1, 81):
            model = of_size(base, n_layers, heads * base.d_head)
            off = abs(cost_of(equal, model, seq_len) / wanted - 1)
            factor = model.d_model * base.n_layers / (n_layers * base.d_model) / float(aspect)
            if off <= MOST and max(factor, 1 / factor) <= MOST_ASPECT and not model.problems():
                found.append((off > NEAR, score_of(base, model, equal, aspect, seq_len), model))
    return min(found, key=lambda one: one[:2])[2] if found else None


@pytest.mark.parametrize("equal", list(Equal))
@pytest.mark.parametrize("changes", [{}, {"window": 32, "window_pattern": "ssf"}])
def test_a_shape_is_the_nearest_of_all(equal, changes):
    base = ModelConfig(n_layers=8, d_model=64, n_heads=8, n_kv_heads=4, d_ff=176, vocab_size=512, **changes)
    for aspect in ASPECTS:
        shape = nearest_shape(base, equal, aspect, 128)
        assert (shape and shape.model) == (searched(base, equal, aspect, 128) if aspect != 1 else base)


@pytest.mark.parametrize(("name", "seq_len"), [("7b", 4096), ("67b", 4096), ("tiny_depth", 128)])
def test_shapes_of_presets_keep_cost_heads_groups_and_ratio(name, seq_len):
    base = preset(name).model
    shapes, missing = shapes_of(base, list(Equal), ASPECTS, seq_len)
    assert missing == [] and len(shapes) == 2 * len(ASPECTS)
    for shape in shapes:
        model = shape.model
        assert model.problems() == [] and (model.d_head, model.group_size) == (base.d_head, base.group_size)
        assert model.d_ff / model.d_model == pytest.approx(base.d_ff / base.d_model, rel=0.05)
        assert model.n_heads * model.d_head / model.d_model == pytest.approx(1, rel=0.21)  # 6 heads of 8 on 40
        off = cost_of(shape.equal, model, seq_len) / cost_of(shape.equal, base, seq_len) - 1
        assert shape.cost_off == pytest.approx(off, abs=1e-12)
        assert abs(off) < (0.05 if name == "tiny_depth" else 0.02)
        aspect = model.d_model * base.n_layers / (model.n_layers * base.d_model)
        assert aspect == pytest.approx(float(shape.aspect), rel=0.2)
    assert [shape.model for shape in shapes if shape.aspect == 1] == [base, base]
    assert all(shape.model.n_layers < 95 for shape in shapes if shape.aspect > 1) or name != "67b"


def test_an_aspect_without_a_shape_is_said():
    base = ModelConfig(n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=128)
    shapes, missing = shapes_of(base, [Equal.params], [Fraction(16), Fraction(1)], 64)
    assert [shape.name for shape in shapes] == ["2x64"]
    assert len(missing) == 1 and missing[0].startswith("16x at equal params: no whole number of layers")


def test_pipelines_are_those_of_the_papers_shape():
    base = preset("67b").model
    even = pipeline_of(base, 4096, ParallelConfig(), 8, 32)
    assert even.blocks == (11, 12) and 0 <= even.imbalance < 0.02
    # 7 of the 32 + 7 turns of an even pipeline are waited through
    assert 7 / 39 <= even.bubble < 7 / 39 + 0.02
    few = pipeline_of(of_size(base, 9, 16384), 4096, ParallelConfig(), 8, 32)
    assert few.imbalance > 0.3 and few.bubble > even.bubble + 0.1 and sum(few.blocks) == 3
    assert pipeline_of(of_size(base, 7, 16384), 4096, ParallelConfig(), 8, 32) is None
