"""pp = 1, 2, 4 over four real processes against a plain PyTorch loop."""

import pytest
import torch

from model.init import initialise
from model.loss import cross_entropy
from model.transformer import Transformer
from tests.parallel.sweep import MODEL, SEED, batches, plain_loop
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks("tests.parallel.sweep", 4, tmp_path_factory.mktemp("sweep"))


def runs(ranks, *, bf16):
    """The runs of a precision, each with the reports of all four ranks."""
    together = [list(reports) for reports in zip(*(rank["runs"] for rank in ranks), strict=True)]
    return [reports for reports in together if reports[0]["bf16"] == bf16]


def test_every_layout_has_the_curve_of_a_plain_loop_clipped_or_not(ranks):
    seen = set()
    for reports in runs(ranks, bf16=False):
        _, curve = plain_loop(reports[0]["clip"])
        for report in reports:  # and every rank knows it
            torch.testing.assert_close(torch.tensor(report["curve"]), torch.tensor(curve), rtol=1e-5, atol=1e-5)
        seen.add((reports[0]["clip"], reports[0]["pp"]))
    assert seen == {(clip, pp) for clip in (1.0, None, 0.05) for pp in (1, 2, 4)}


def test_clipping_clips(ranks):
    """Else the test above would hold with clipping that does nothing."""
    norms = {reports[0]["clip"]: [norm for _, norm in reports[0]["curve"]] for reports in runs(ranks, bf16=False)}
    assert min(norms[None]) > 0.05
    assert norms[0.05] != pytest.approx(norms[None], rel=1e-3)


def test_the_weights_after_training_are_those_of_the_plain_loop(ranks):
    for reports in runs(ranks, bf16=False):
        model, _ = plain_loop(reports[0]["clip"])
        expected = dict(model.named_parameters())
        held = set()
        for report in reports:
            for name, values in report["weights"].items():
                # by norm: Adam turns the rounding of a gradient near zero into a step of its own
                off = (torch.tensor(values) - expected[name].data).norm() / expected[name].data.norm()
                assert off < 1e-4, name
            held |= set(report["weights"])
        assert held == set(expected)


def test_initial_weights_are_bitwise_the_same_on_every_layout(ranks):
    model = Transformer(MODEL)
    initialise(model, "", SEED, MODEL.init_std)
    expected = dict(model.named_parameters())
    for reports in runs(ranks, bf16=False):
        if reports[0]["start"] is None:
            continue
        for report in reports:
            for name, values in report["start"].items():
                assert torch.equal(torch.tensor(values), expected[name].data), name


def test_every_layer_is_in_exactly_one_stage(ranks):
    for reports in runs(ranks, bf16=False):
        stages = {report["stage"]: set(report["weights"]) for report in reports}
        assert len(stages) == reports[0]["pp"]
        assert sum(map(len, stages.values())) == len(set().union(*stages.values()))


def test_bf16_agrees_over_layouts(ranks):
    first, *others = runs(ranks, bf16=True)
    assert len(others) == 2
    expected = torch.tensor(first[0]["curve"])
    for reports in others:
        # Gradients are accumulated and reduced in fp32; what is left is a weight that rounds to its other neighbour.
        got = torch.tensor(reports[0]["curve"])
        torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(got[:, 0], expected[:, 0], rtol=5e-4, atol=0)
        torch.testing.assert_close(got[:, 1], expected[:, 1], rtol=5e-3, atol=0)
    _, exact = plain_loop(1.0)
    torch.testing.assert_close(expected[:, 0], torch.tensor(exact)[:, 0], rtol=1e-2, atol=0)


def test_evaluation_and_sampling_see_the_trained_model(ranks):
    for reports in runs(ranks, bf16=False):
        model, _ = plain_loop(reports[0]["clip"])
        tokens, labels = batches(99)
        with torch.no_grad():
            loss = cross_entropy(model(tokens), labels).item()
            logits = model(batches(98)[0][:3, :12])[torch.arange(3), torch.tensor([5, 12, 1]) - 1]
        for report in reports:
            assert report["eval"] == pytest.approx(loss, rel=1e-5)
            torch.testing.assert_close(torch.tensor(report["logits"]), logits, rtol=1e-3, atol=1e-4)


def test_measured_costs_are_one_list_for_all_ranks(ranks):
    costs = ranks[0]["measured"]
    assert all(rank["measured"] == costs for rank in ranks)
    assert len(costs) == MODEL.n_layers + 2 and min(costs) > 0
    assert len(set(costs[1:-1])) == 1
