"""A checkpoint of one layout goes on in every other; on its own, to the last bit."""

import pytest
import torch

from tests.train.checkpoint import runs

# Seven layers, which no layout divides evenly; two key/value heads, which four ranks hold twice; a vocabulary of 403.
STEPS = 8
SHAPE = ["model.n_layers=7", "model.vocab_size=403", f"train.max_steps={STEPS}"]
WIDE = ["parallel.pp=2", "parallel.tp=2", "parallel.dp=2", "parallel.schedule=zbv"]
OTHERS = {
    "one process": (1, []),
    "pp4": (4, ["parallel.pp=4"]),
    "pp2 interleaved": (2, ["parallel.pp=2", "parallel.schedule=interleaved", "parallel.virtual_stages=3"]),
    "tp4": (4, ["parallel.tp=4"]),
    "pp3": (3, ["parallel.pp=3", "parallel.recompute=full", "parallel.schedule=zero_bubble"]),
}


@pytest.fixture(scope="module")
def base(overrides):
    return [*overrides, *SHAPE]


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    """Eight processes, saved after four steps among others."""
    folder = tmp_path_factory.mktemp("wide")
    runs.finish(folder, 8, *base, *WIDE, module=runs.PATIENT)
    return folder


def go_on(folder, num, base, layout, checkpoint):
    runs.finish(folder, num, *base, *layout, f"resume={checkpoint}", module=runs.PATIENT)


def assert_same_curve(folder, other, steps, tolerance=1e-4):
    one, two = runs.curve(folder), runs.curve(other)
    assert set(steps) <= set(one)
    for step in steps:
        assert one[step] == pytest.approx(two[step], rel=tolerance), step


def assert_same_tensors(checkpoint, other):
    one, two = runs.whole(checkpoint), runs.whole(other)
    assert one.keys() == two.keys() and len(one) == 3 * (1 + 7 * 9 + 2)
    for name, tensor in one.items():
        assert (tensor - two[name]).norm() <= 1e-3 * two[name].norm(), name


@pytest.mark.launch
def test_the_same_layout_goes_on_to_the_last_bit(uninterrupted, base, tmp_path):
    go_on(tmp_path, 8, base, WIDE, runs.saved(uninterrupted, 4))
    assert_same_curve(tmp_path, uninterrupted, range(5, STEPS + 1), tolerance=0)
    assert runs.digests(runs.saved(tmp_path, STEPS)) == runs.digests(runs.saved(uninterrupted, STEPS))


@pytest.mark.launch
@pytest.mark.parametrize("name", OTHERS)
def test_another_layout_goes_on_within_rounding(name, uninterrupted, base, tmp_path):
    num, layout = OTHERS[name]
    go_on(tmp_path, num, base, layout, runs.saved(uninterrupted, 4))
    assert_same_curve(tmp_path, uninterrupted, range(5, STEPS + 1))
    assert_same_tensors(runs.saved(tmp_path, STEPS), runs.saved(uninterrupted, STEPS))


@pytest.mark.launch
def test_and_back_again(uninterrupted, base, tmp_path):
    narrow, wide = tmp_path / "narrow", tmp_path / "wide"
    go_on(narrow, 3, base, ["parallel.pp=3"], runs.saved(uninterrupted, 4))
    go_on(wide, 8, base, WIDE, runs.saved(narrow, 6))
    assert_same_curve(wide, uninterrupted, range(7, STEPS + 1))
    assert_same_tensors(runs.saved(wide, STEPS), runs.saved(uninterrupted, STEPS))


@pytest.mark.launch
def test_in_bf16_the_master_weights_go_on_to_the_last_bit(base, tmp_path):
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    half = [*base, "model.n_layers=2", "train.precision=bf16", "parallel.tp=2", "parallel.dp=2"]
    runs.finish(through, 4, *half, "train.max_steps=6")
    runs.finish(stopped, 4, *half, "train.max_steps=4")
    runs.finish(stopped, 4, *half, "train.max_steps=6")
    assert runs.curve(stopped) == runs.curve(through)
    assert runs.digests(runs.saved(stopped, 6)) == runs.digests(runs.saved(through, 6))
    weights = runs.whole(runs.saved(through, 6))["head.proj.weight"]
    assert not torch.equal(weights, weights.bfloat16().float())
