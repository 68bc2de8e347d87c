"""Shapes stand where their M is wanted, and are the ones that the presets of the ladder have."""

import math

import pytest

from launch.scaling.ladder import Ladder, Shape, embedding_share, shapes_of
from launch.scaling.laws import M_OPT
from model.problems import BadInput
from tests.shapes import preset


def ladder(name="8x512"):
    config = preset(name)
    return Ladder(config.model, config.train.seq_len)


@pytest.mark.parametrize("name", ["8x512", "12x768", "24x1024", "24x2048", "32x4096", "80x8192"])
def test_models_of_the_ladder_are_those_of_the_presets(name):
    assert ladder().model(Shape.of(name)).num_params != ladder().base.num_params or name == "8x512"
    own = preset(name)
    made = Ladder(own.model, 4096).model(Shape.of(name))
    assert made.num_params == own.model.num_params and made.problems() == []
    assert Ladder(own.model, 4096).m(Shape.of(name)) == own.model.scaling_m(4096)


@pytest.mark.parametrize("compute", [1e17, 1e19, 3e20])
@pytest.mark.parametrize("sizes", [3, 5, 10])
def test_m_spans_a_decade_around_the_papers_best(compute, sizes):
    wide = ladder("24x1024")
    middle = M_OPT.at(compute)
    shapes = wide.around(middle, sizes)
    m = [wide.m(shape) for shape in shapes]
    assert len(set(shapes)) == sizes and m == sorted(m)
    wanted = [middle * 10 ** (-0.5 + at / (sizes - 1)) for at in range(sizes)]
    assert all(abs(math.log(one / other)) < 0.25 for one, other in zip(m, wanted, strict=True))
    aspects = [shape.d_model / shape.n_layers for shape in shapes]
    assert all(1 / 2 < aspect / (1024 / 24) < 2 for aspect in aspects)
    (alone,) = wide.around(middle, 1)
    assert abs(math.log(wide.m(alone) / middle)) < 0.25


def test_models_too_small_to_stand_anywhere_still_differ():
    small = ladder()
    shapes = small.around(1.0, 5)  # below what one layer of one head has
    assert len(set(shapes)) == 5 and shapes[0] == Shape(1, 64)
    assert [small.m(shape) for shape in shapes] == sorted(small.m(shape) for shape in shapes)


def test_groups_are_the_presets_or_the_nearest_smaller():
    grouped = Ladder(preset("67b").model, 4096)  # 8 query heads of 128 to a key/value head
    assert [grouped.model(Shape(1, 128 * heads)).n_kv_heads for heads in (64, 16, 12, 7, 1)] == [8, 2, 1, 1, 1]
    assert "model.n_kv_heads=2" in grouped.overrides(Shape(4, 2048)) and grouped.model(Shape(4, 2048)).d_ff == 5632


def test_shapes_that_cannot_be_are_said_together():
    found, problems = shapes_of(["8x512", "4by4", "4x100", "2x128", "8x512"], ladder())
    assert found == [Shape(2, 128), Shape(8, 512)]
    assert problems == [
        "scaling.shapes=4by4: no shape; layers x width, such as 8x512, would work",
        "scaling.shapes=4x100: 100 is no multiple of the 64 of a head; scaling.shapes=4x64 or scaling.shapes=4x128 "
        "would work",
        "scaling.shapes: 8x512 stands there twice; once would work",
    ]
    with pytest.raises(BadInput):
        Shape.of("0x512")


def test_the_embeddings_share_is_that_of_all_parameters():
    model = ladder().base
    assert embedding_share(model) == pytest.approx(2 * 102400 * 512 / model.num_params)
