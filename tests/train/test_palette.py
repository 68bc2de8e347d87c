"""The colours of pictures, as people with and without all kinds of cones see them, and as a printer without colours."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from launch.report import page
from parallel.schedules import Pass
from train import palette

# Machado, Oliveira and Fernandes 2009, "A Physiologically-based Model for Simulation of Color Vision Deficiency",
# severity 1.0: what is done to linear RGB.
CONES = {
    "all": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE, DARK_CARD = "#FFFFFF", "#1A2029"
seen_by = pytest.mark.parametrize("cones", CONES)


def linear(color):
    """Linear RGB of sRGB, IEC 61966-2-1."""
    values = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(color, cones="all"):
    """CIELAB of a colour under D65."""
    xyz = TO_XYZ @ np.clip(np.array(CONES[cones]) @ linear(color), 0, 1) / TO_XYZ.sum(1)
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


def least_difference(colors, cones):
    """The least distance in CIELAB; 2.3 is just noticeable side by side."""
    return min(np.linalg.norm(lab(one, cones) - lab(other, cones)) for one, other in combinations(colors, 2))


def contrast(one, other):
    """The contrast of WCAG 2.1, from 1 to 21."""
    darker, lighter = sorted(TO_XYZ[1] @ linear(color) for color in (one, other))
    return (lighter + 0.05) / (darker + 0.05)


def test_cielab_and_contrast_are_those_of_known_colours():
    assert lab("#FFFFFF") == pytest.approx([100, 0, 0], abs=0.01)
    assert lab("#FF0000") == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)
    grey = lab("#808080", "deuteranopia")
    assert grey == pytest.approx(lab("#808080"), abs=0.1), "who sees no green sees greys as they are"


@seen_by
def test_series_and_kinds_of_memory_are_told_apart(cones):
    assert least_difference(palette.COLORS, cones) > 15
    assert least_difference(palette.MEMORY.values(), cones) > 15


@seen_by
def test_passes_are_told_apart_also_those_of_later_stages(cones):
    for passes in (palette.PASSES, palette.PASSES_ON_DARK):
        assert least_difference(passes.values(), cones) > 30
    assert least_difference([*palette.PASSES.values(), palette.WAITING], cones) > 30
    assert least_difference([*palette.PASSES_ON_DARK.values(), palette.WAITING_ON_DARK], cones) > 20
    assert least_difference([palette.paler(color, 0.45) for color in palette.PASSES.values()], cones) > 15


def test_passes_are_told_apart_in_grey():
    lightness = sorted(lab(color)[0] for color in (*palette.PASSES.values(), WHITE))
    assert min(np.diff(lightness)) > 20


def test_colours_stand_out_from_their_page():
    assert DARK_CARD in Path(page.__file__).with_name("page.css").read_text("utf-8").upper()
    assert min(contrast(color, WHITE) for color in (*palette.SERIES, *palette.PASSES.values())) > 2
    assert min(contrast(color, DARK_CARD) for color in (*palette.SERIES, *palette.PASSES_ON_DARK.values())) > 3


def test_a_series_looks_like_no_other():
    looks = [palette.look_of(index) for index in range(49)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 49
    assert [look["color"] for look in looks[:7]] == list(palette.COLORS)
    assert len({look["marker"] for look in looks[:7]}) == 7, "without colours the markers tell"
    assert {look["linestyle"] for look in looks[:7]} == {"-"} and looks[7]["linestyle"] == "--"


def test_paler_is_nearer_to_white_and_text_is_legible():
    assert palette.paler("#004488", 0) == "#004488" and palette.paler("#004488", 1) == "#FFFFFF"
    assert palette.paler("#000000", 0.5) == "#808080"
    for what in Pass:
        for share in (0, 0.2, 0.45):
            color = palette.paler(palette.PASSES[what], share)
            assert contrast(palette.text_on(color), color) > 4.4, (what, share)
