"""Predictions of whole jobs: what they consist of, and what they say of layouts whose order is known."""

from dataclasses import replace

import pytest

from conf.clusters import cluster_of
from parallel.engine import EngineSettings
from parallel.layout import Layout, Recompute
from parallel.plan.costs import Prices, Reach
from parallel.plan.job import Job
from parallel.plan.operations import Attention, Product
from parallel.plan.predict import predict
from parallel.schedules import Schedule, placement_of
from tests.shapes import preset

MODEL = preset("67b").model
CLUSTER = cluster_of("32x8xh100")


def job(tp, pp, micro_batches=64, schedule="1f1b", recompute="none", micro_batch=1, head_pieces=1, virtual=None):
    """The 67B on 256 GPUs."""
    kind = Schedule[schedule]
    settings = EngineSettings(
        micro_batch, micro_batches, 1.0, True, 1, 4096, Recompute[recompute], head_pieces, kind,
        placement_of(kind, pp, virtual),
    )  # fmt: skip
    return Job(MODEL, Layout(256 // (tp * pp), pp, tp, tp > 1), settings)


def seconds(*how, **more):
    return predict(job(*how, **more), CLUSTER).seconds


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"])
def test_the_parts_add_up_and_the_counts_agree(schedule):
    found = predict(job(4, 8, schedule=schedule), CLUSTER)
    whole = sum(found.compute.values()) + sum(found.exposed.values()) + found.optimizer + found.waiting
    assert whole == pytest.approx(found.seconds)
    assert all(part >= 0 for part in (*found.compute.values(), *found.exposed.values(), found.waiting))
    assert found.bubble == found.waiting / found.seconds
    flops = found.job.tokens_per_step * MODEL.flops_per_token(4096)
    assert found.mfu == pytest.approx(flops / (found.seconds * 256 * 989e12))
    assert found.mfu < found.mfu_whole_attention < 0.73
    assert found.compute["products"] > flops * 0.9 / (256 * 0.73 * 989e12)
    assert found.timeline.seconds == pytest.approx(found.seconds, rel=0.05)


def test_what_is_known_of_layouts_holds():
    assert seconds(4, 8, schedule="interleaved") < seconds(4, 8)
    assert seconds(4, 8) < seconds(4, 8, recompute="selective") < seconds(4, 8, recompute="ffn")
    assert seconds(4, 8, recompute="ffn") < seconds(4, 8, recompute="full")
    assert seconds(4, 8) < seconds(4, 8, head_pieces=8)
    full = predict(job(4, 8, recompute="full"), CLUSTER).compute
    none = predict(job(4, 8), CLUSTER).compute
    assert full["products"] / none["products"] == pytest.approx(4 / 3, rel=0.03)
    # More ranks that share matrices wait more for each other, and over a slower network all the more.
    waits = [predict(job(tp, 8, micro_batches=64 * tp), CLUSTER).exposed["tp"] for tp in (1, 2, 4, 8)]
    assert waits == sorted(waits) and waits[0] == 0
    slow = cluster_of("64x4xh100")
    assert predict(job(8, 8), slow).exposed["tp"] > 2 * predict(job(8, 8), CLUSTER).exposed["tp"]
    # A bubble of (p - 1) / m of 1f1b, for stages that are nearly even.
    found = predict(job(1, 8, micro_batches=32), CLUSTER)
    assert found.waiting / (found.seconds - found.waiting) == pytest.approx(7 / 32, rel=0.2)


def test_windows_leave_attention_out_block_by_block():
    def attention(**slides):
        planned = job(4, 8)
        return predict(replace(planned, model=replace(MODEL, **slides)), CLUSTER).compute["attention"]

    full, sliding = attention(), attention(window=512)
    seen = (512 * 4096 - 512**2 / 2) / (4096**2 / 2)
    assert seen * full < sliding < 2 * seen * full
    # A window is worked through at the rate of a sequence in which queries see as many keys: 480 of them on average.
    prices, kernels = Prices(CLUSTER), (Attention(1, 4096, 16, 16, 128, window=512), Attention(1, 960, 16, 16, 128))
    slow, same = (one.flops / (prices.attention(one) - prices.launch) for one in kernels)
    assert slow == pytest.approx(same)
    slides = 95 - 95 // 6
    mixed = (slides * sliding + (95 - slides) * full) / 95
    assert attention(window=512, window_pattern="sssssf") == pytest.approx(mixed, rel=1e-6)
    assert attention(window=4095) == pytest.approx(full, rel=1e-3)
    # A stage has more layers where they cost less: the last sixth of the model is full here.
    stages = replace(job(1, 8), model=replace(MODEL, window=128, window_pattern="s" * 79 + "f" * 16)).stages
    assert stages[0].stop - stages[0].start > stages[-2].stop - stages[-2].start


def test_a_prediction_is_that_of_the_cluster_that_it_is_asked_for():
    base = predict(job(2, 8), CLUSTER)
    for change in ("product_share", "attention_forward_share", "hbm_share", "inter_share", "slowest_share"):
        other = cluster_of("32x8xh100")
        setattr(other, change, getattr(other, change) / 2)
        assert predict(job(2, 8), other).seconds > base.seconds, change
    assert predict(job(2, 8), cluster_of("32x8xa100")).seconds > 2.5 * base.seconds
    # All wait for the slowest GPU where its products were measured, too.
    measured = cluster_of("32x8xh100")
    measured.products, measured.slowest_share = [[4096.0, 4096.0, 4096.0, 700.0]], 1.0
    usual = predict(job(2, 8), measured).compute["products"]
    measured.slowest_share = 0.5
    assert predict(job(2, 8), measured).compute["products"] == pytest.approx(2 * usual, rel=0.02)


def test_prices_are_those_of_the_published_microbenchmarks():
    """What the presets cite: 720 and 257 TFLOP/s at 8192^3, FlashAttention at 16k, nccl-tests' bandwidths."""
    h100, a100 = cluster_of("h100"), cluster_of("a100")
    h100.slowest_share = a100.slowest_share = 1.0
    cube = Product(8192, 8192, 8192)
    assert cube.flops / Prices(h100).product(cube) == pytest.approx(720e12, rel=0.04)
    assert cube.flops / Prices(a100).product(cube) == pytest.approx(257e12, rel=0.02)
    for cluster, forward, backward in ((h100, 648e12, 550e12), (a100, 187e12, 172e12)):
        for gradient, rate in ((False, forward), (True, backward)):
            kernel = Attention(1, 16384, 16, 16, 128, gradient)
            assert kernel.flops / Prices(cluster).attention(kernel) == pytest.approx(rate, rel=0.06)
    short, long = (Attention(1, length, 16, 16, 128) for length in (2048, 16384))
    rates = [one.flops / Prices(a100).attention(one) for one in (short, long)]
    assert rates[0] / rates[1] == pytest.approx(155 / 187, rel=0.04)
    node, rail = Reach(8, 8), Reach(32, 1)
    size = 2**30
    assert size * 7 / 8 / Prices(a100).message("all_gather", size, node) == pytest.approx(235e9, rel=0.02)
    assert size * 2 * 7 / 8 / Prices(h100).message("all_reduce", size, node) == pytest.approx(360e9, rel=0.02)
    assert size * 31 / 32 / Prices(h100).message("reduce_scatter", size, rail) == pytest.approx(45e9, rel=0.02)
    # NCCL's latencies: 14 steps of LL128 in a machine; a few numbers over 1,024 GPUs take well under a millisecond.
    assert Prices(h100).message("all_reduce", 1024, node) == pytest.approx(1e-6 * (14 + 14 * 1.9), rel=0.01)
    assert 5e-5 < Prices(h100).agreement(Reach(1024, 8)) < 2e-4


def test_measured_products_take_the_place_of_shares():
    measured = cluster_of("h100")
    measured.slowest_share = 1.0
    measured.products = [[4096.0, 8192.0, 8192.0, 650.0], [256.0, 256.0, 256.0, 10.0]]
    near, far = Product(4096, 8192, 11008), Product(128, 300, 200)
    assert near.flops / (Prices(measured).product(near) - 2e-6) == pytest.approx(650e12)
    assert far.flops / (Prices(measured).product(far) - 2e-6) == pytest.approx(10e12)
