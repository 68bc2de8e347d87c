"""Pictures of simulated steps, as dots and as matplotlib's own shapes: what can be told apart in them."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib import colors, image, pyplot

from parallel.schedules import Pass, Schedule, orders, placement_of
from parallel.simulation import Costs, simulate
from train.palette import PASSES, paler
from train.timeline_picture import DPI, WIDTH, bars_on, draw_rows, prepare, rows_height


def step_of(name, ranks, micro_batches):
    place = placement_of(Schedule[name], ranks, None)
    each = [0.01] * place.num_stages
    return simulate(orders(Schedule[name], place, micro_batches), place, Costs(each, each, each)).spans, place


def share_of(dots, color):
    """The share of dots that have exactly this colour."""
    return float(np.mean(np.all(np.round(255 * dots[..., :3]) == np.round(255 * np.array(colors.to_rgb(color))), -1)))


@pytest.mark.parametrize(("name", "ranks"), [("1f1b", 4), ("zbv", 2), ("zero_bubble", 12)])
def test_a_step_of_1152_micro_batches_is_legible(tmp_path, name, ranks):
    rows, place = step_of(name, ranks, 1152)
    path = tmp_path / "step.png"
    draw_rows([("measured", rows)], place, path, 1000, "ms")
    dots = image.imread(path)
    assert dots.shape[1] == WIDTH * DPI and dots.shape[0] < 1.3 * dots.shape[1]
    assert path.stat().st_size < 300_000
    opaque = dots[..., 3].min() if dots.shape[-1] == 4 else 1
    assert opaque == 1 and dots[0, 0, :3].min() == 1, "white, so that it can be read on a dark page too"
    found, later = {span.action.what for row in rows for span in row}, 0.45 if place.virtual > 1 else 0
    # Were all 1,152 micro-batches drawn, bars would be half a dot wide, and hardly a dot would have a pass's colour.
    shares = [share_of(dots, color) for what in found for color in {PASSES[what], paler(PASSES[what], later)}]
    assert sum(shares) > 0.25 and min(shares) > 0.03, shares


def test_bars_of_many_ranks_are_dots_in_a_small_svg(tmp_path):
    rows, place = step_of("zero_bubble", 32, 256)
    path = tmp_path / "step.svg"
    draw_rows([("measured", rows)], place, path, 1000, "ms")
    text = path.read_text("utf-8")
    assert path.stat().st_size < 300_000 and text.count("<image") == 2  # the beginning and the end
    rows, place = step_of("zero_bubble", 2, 8)
    draw_rows([("measured", rows)], place, path, 1000, "ms")
    assert path.read_text("utf-8").count("<image") == 0


def drawn(name, ranks, micro_batches):
    """Axes with the bars of a whole step."""
    rows, place = step_of(name, ranks, micro_batches)
    figure, axes = pyplot.subplots(figsize=(WIDTH, rows_height(place) + 0.5), layout="constrained")
    prepare(axes, place, 0.0, 1000 * max(row[-1].end for row in rows))
    figure.draw_without_rendering()
    numbered = bars_on(axes, rows, place, 1000)
    pyplot.close(figure)
    return rows, axes, numbered


def test_wide_bars_have_edges_and_their_micro_batches_numbers():
    rows, axes, numbered = drawn("1f1b", 2, 8)
    passes = sum(map(len, rows))
    assert numbered and len(axes.texts) == passes
    assert sorted(text.get_text() for text in axes.texts) == sorted(str(s.action.micro_batch) for r in rows for s in r)
    assert all(bars.get_linewidth() > 0 for bars in axes.collections)
    for text in axes.texts:
        width = text.get_window_extent().width
        x = text.get_position()[0]
        (span,) = [s for s in rows[int(text.get_position()[1] + 0.5)] if 1000 * s.start < x < 1000 * s.end]
        bar = axes.transData.transform([(1000 * span.start, 0), (1000 * span.end, 0)])
        assert text.get_text() == str(span.action.micro_batch) and width < bar[1][0] - bar[0][0]


def test_narrow_bars_have_neither():
    _, axes, numbered = drawn("zero_bubble", 4, 150)
    assert not numbered and not axes.texts
    assert all(bars.get_linewidth() == 0 for bars in axes.collections)


def test_later_stages_are_paler_and_lower():
    _, axes, _ = drawn("interleaved", 2, 4)
    tall = {}
    for bars in axes.collections:
        corners = bars.get_paths()[0].vertices
        tall[colors.to_hex(bars.get_facecolor()[0]).upper()] = np.ptp(corners[:, 1])
    assert tall == pytest.approx(
        {
            PASSES[Pass.F]: 0.84,
            PASSES[Pass.B]: 0.84,
            paler(PASSES[Pass.F], 0.45): 0.54,
            paler(PASSES[Pass.B], 0.45): 0.54,
        }
    )


@pytest.mark.parametrize(("ranks", "marks"), [(2, 2), (16, 16), (64, 8)])
def test_names_of_ranks_have_room(ranks, marks):
    place = placement_of(Schedule["1f1b"], ranks, None)
    figure, axes = pyplot.subplots(figsize=(WIDTH, rows_height(place) + 0.5), layout="constrained")
    prepare(axes, place, 0.0, 1.0)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    pyplot.close(figure)
    assert len(boxes) == marks
    assert all(above.y0 > below.y1 - 1 for above, below in pairwise(boxes))
    assert rows_height(place) * DPI < 1000
