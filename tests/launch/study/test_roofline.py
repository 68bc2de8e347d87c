"""The counts of prefill and decoding against the model that runs, and rooflines computed by hand."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from conf.clusters import cluster_of
from launch import cli
from launch.bench.common import RandomWeights
from launch.study.decode import seconds_by_turns
from launch.study.roofline import measured
from launch.study.roofline.command import kv_heads_of
from launch.study.roofline.counts import (
    PARTS,
    Ceilings,
    Phase,
    Work,
    cache_bytes,
    ceilings_of,
    pass_work,
    weight_bytes,
)
from launch.study.roofline.findings import first_context, roofline_findings
from launch.study.roofline.tables import as_text, conclusions
from model.generate import Decoder
from model.transformer import full_shapes
from parallel.decode import load_stage
from parallel.layout import Layout
from parallel.plan.cluster import Cluster
from parallel.sharding import shard
from tests.shapes import preset, small

BATCH, CONTEXT = 3, 24
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Moved(TorchDispatchMode):
    """Sums the bytes of inputs and of the first output of each kind of operation."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) else out
        sizes = [x.nbytes for x in tree_leaves((args, first)) if isinstance(x, torch.Tensor)]
        name = func.overloadpacket
        self.bytes[name] = self.bytes.get(name, 0) + sum(sizes)
        return out


def pairs(q_BHLK, k_BHMK, v_BHMK, *rest, out_shape=None, **how):
    """Every pair of a query and a key: two products."""
    (batch, heads, length, width), keys = q_BHLK, k_BHMK[2]
    return 4 * batch * heads * length * keys * width


def ran(model, phase):
    """The FLOPs and the bytes of a pass of the model itself in fp32, and the decoder that ran it."""
    stages, _ = load_stage(RandomWeights(model), Layout(dp=1, pp=1), torch.device("cpu"), torch.float32)
    decoder = Decoder(stages[0], [list(range(1, CONTEXT + 1))] * BATCH, CONTEXT + 4)
    if phase is Phase.decode:
        decoder.prefill()
    with FlopCounterMode(display=False, custom_mapping={ATTENTION: pairs}) as flops, Moved() as moved:
        decoder.prefill() if phase is Phase.prefill else decoder.step(torch.zeros(BATCH, dtype=torch.int64))
    return flops.get_flop_counts()["Global"], moved.bytes, decoder


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("phase", Phase)
def test_flops_and_bytes_are_those_of_the_model_that_runs(phase, kv_heads):
    model = small(kv_heads)
    flops, moved, _ = ran(model, phase)
    work = pass_work(model, phase, BATCH, CONTEXT, bytes_per_value=4)
    assert work["products"].flops + work["head"].flops == flops[torch.ops.aten.mm]
    halves = 2 if phase is Phase.prefill else 1  # of the square that the counter counts the causal half is seen
    assert halves * work["attention"].flops == flops[ATTENTION]
    # The head's part has more: the choice of the last token, and its norm.
    products = work["products"].num_bytes + work["head"].num_bytes - 4 * BATCH * model.d_model * 4
    assert products == moved[torch.ops.aten.mm]
    attention = work["attention"]
    kept = BATCH * model.kv_cache_bytes(CONTEXT if phase is Phase.prefill else 1, 4)
    if phase is Phase.prefill:  # it reads what it has computed, and a copy of that is kept
        assert attention.cache == kept
        assert attention.num_bytes - 2 * kept == moved[ATTENTION]
    else:  # the new keys and values are read and written before all are read
        assert attention.num_bytes - 2 * kept == moved[ATTENTION]


@pytest.mark.parametrize("window", [8, CONTEXT])
def test_a_window_bounds_what_decoding_reads_and_prefill_multiplies(window):
    model = small(2, n_layers=3, window=window, window_pattern="sf")
    flops, moved, _ = ran(model, Phase.decode)
    step = pass_work(model, Phase.decode, BATCH, CONTEXT, bytes_per_value=4)
    assert step["attention"].flops == flops[ATTENTION]
    assert step["attention"].num_bytes - 2 * BATCH * model.kv_cache_bytes(1, 4) == moved[ATTENTION]
    prefill = pass_work(model, Phase.prefill, BATCH, CONTEXT, bytes_per_value=4)
    assert 3 * prefill["attention"].flops == model.attention_flops([CONTEXT] * BATCH)[0]
    full = pass_work(small(2, n_layers=3), Phase.prefill, BATCH, CONTEXT, bytes_per_value=4)
    assert (prefill["attention"].flops < full["attention"].flops) == (window < CONTEXT)
    assert prefill["attention"].cache == BATCH * model.kv_cache_bytes(CONTEXT, 4)


@pytest.mark.parametrize("changes", [{}, {"window": 8}, {"window": 8, "window_pattern": "sf"}])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_a_cache_has_the_bytes_of_the_decoders(kv_heads, changes):
    model = small(kv_heads, **changes)
    _, _, decoder = ran(model, Phase.prefill)
    decoder.lengths_B -= 1  # what is held counts the token that was added last
    held = sum(part.nbytes for cache in decoder.caches for part in cache.held()[:2])
    assert held == BATCH * cache_bytes(model, CONTEXT, bytes_per_value=4)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_ranks_weights_and_heads_are_those_of_its_shards(kv_heads, tp):
    model = small(kv_heads, n_layers=3, vocab_size=301)
    shapes = full_shapes(model)
    parts = {name: shard(name, shape, model, tp, 0) for name, shape in shapes.items()}
    sizes = {name: parts[name].of(torch.empty(shape, device="meta")).numel() for name, shape in shapes.items()}
    assert weight_bytes(model, tp) == 2 * sum(sizes.values())
    read = sum(work.weights for work in pass_work(model, Phase.decode, BATCH, CONTEXT, tp).values())
    assert read == 2 * (sum(sizes.values()) - sizes["embedding.tokens.weight"])
    key = sizes["blocks.0.attention.qkv.k_proj.weight"] // model.d_model
    assert cache_bytes(model, CONTEXT, tp) == 2 * model.n_layers * 2 * key * CONTEXT


def test_ranks_send_the_sums_of_each_block_and_their_logits():
    model = small(2)
    assert pass_work(model, Phase.decode, BATCH, CONTEXT)["messages"] == Work()
    ring = 2 * 3 / 4 * BATCH * model.d_model * 2  # an all-reduce over 4 ranks in bf16
    sent = pass_work(model, Phase.decode, BATCH, CONTEXT, 4)["messages"].sent
    assert sent == (2 * model.n_layers + 1) * ring + 3 / 4 * BATCH * model.vocab_size * 4


def test_decoding_uses_the_cache_by_the_group_size_whatever_batch_and_length():
    model = preset("67b").model
    for n in (64, 8, 1):
        for batch, context in ((1, 4096), (64, 4096), (64, 65536)):
            attention = pass_work(replace(model, n_kv_heads=n), Phase.decode, batch, context)["attention"]
            assert attention.flops / attention.cache == pytest.approx(64 / n, rel=1e-3)
    work = pass_work(model, Phase.decode, 16, 4096)
    assert work["products"].intensity == pytest.approx(16, rel=0.01)


def ceilings(**changes):
    return replace(Ceilings("a device", "made up", 1000.0, 500.0, 10.0, 5.0, 2**20), **changes)


def test_a_part_takes_the_longest_of_its_needs():
    device = ceilings()
    assert device.ridge == 100
    assert (device.seconds("products", Work(2000, weights=10)), device.bound("products", Work(2000, weights=10))) == (
        2.0,
        "compute",
    )
    assert device.seconds("attention", Work(2000, cache=10)) == 4.0
    work = Work(2000, weights=10, cache=30, activations=40)
    assert (work.intensity, device.seconds("products", work), device.bound("products", work)) == (25, 8.0, "memory")
    assert (device.seconds("messages", Work(sent=20)), device.bound("messages", Work(sent=20))) == (4.0, "links")


def test_ceilings_are_the_data_sheets_or_what_kernels_reach():
    h100 = cluster_of("h100")
    sheet, fp32, reached = ceilings_of(h100), ceilings_of(h100, 4), ceilings_of(h100, achieved=True)
    assert (sheet.product_flops, sheet.attention_flops, sheet.bytes_per_second) == (989e12, 989e12, 3350e9)
    assert sheet.ridge == pytest.approx(295.2, abs=0.1) and fp32.product_flops == 67e12
    assert reached.product_flops == pytest.approx(989e12 * 0.73)
    assert reached.attention_flops == pytest.approx(989e12 * 0.68)
    assert reached.bytes_per_second == pytest.approx(3350e9 * h100.hbm_share)
    assert sheet.memory_bytes == (79.1 - h100.reserved_gib) * 2**30
    assert (sheet.sent_per_second, ceilings_of(h100, tp=8).sent_per_second) == (450e9, 450e9)
    slow = Cluster(inter_gb_per_s=10, intra_gb_per_s=450, gpus_per_node=8)
    assert ceilings_of(slow, tp=16).sent_per_second == 80e9


def test_the_first_context_is_found_exactly():
    assert [first_context(lambda n, at=at: n >= at) for at in (1, 2, 3, 1000, 2**24)] == [1, 2, 3, 1000, 2**24]
    assert first_context(lambda n: n > 2**24) is None


@pytest.fixture(scope="module")
def found():
    return roofline_findings(preset("67b").model, [64, 8, 1], [1, 16], [1024, 16384], ceilings_of(cluster_of("h100")))


def test_points_add_up(found):
    for model in found["models"]:
        assert len(model["points"]) == 2 * 2 * 2
        for point in model["points"]:
            parts = point["parts"]
            assert set(parts) == set(PARTS) - {"messages"}
            assert point["seconds"] == pytest.approx(sum(part["seconds"] for part in parts.values()))
            kinds = ("weight_bytes", "cache_bytes", "activation_bytes")
            assert point["bytes"] == sum(part[kind] for part in parts.values() for kind in kinds)
            tokens = point["batch"] * (point["context"] if point["phase"] == "prefill" else 1)
            assert point["tokens_per_second"] == pytest.approx(tokens / point["seconds"])


def test_crossings_are_where_formulas_have_them(found):
    many, eight, one = found["models"]
    assert [model["attention"] for model in found["models"]] == ["MHA", "GQA-8", "MQA"]
    # A step of batch 1 reads the weights without the embedding, and of each token of context its keys and values.
    shape = preset("67b").model
    for model, n in ((many, 64), (eight, 8), (one, 1)):
        own = replace(shape, n_kv_heads=n)
        read = 2 * (own.num_params - own.vocab_size * own.d_model)
        expected = read / own.kv_cache_bytes_per_token()
        assert model["crossings"]["cache_equals_weights"]["1"] == pytest.approx(expected, abs=3)
        assert model["crossings"]["cache_equals_weights"]["16"] == pytest.approx(expected / 16, abs=3)
        # 4 H K T^2 / 2 = 2 (attention + feed-forward) T
        expected = (own.attention_params + own.ffn_params) / (own.n_heads * own.d_head)
        assert model["crossings"]["attention_equals_products"] == pytest.approx(expected, abs=2)
    parted = [model["crossings"]["parted"]["16"] for model in found["models"]]
    assert parted[0] < parted[1] and parted[2] is None


def test_prefill_multiplies_alike_and_decoding_moves_in_proportion(found):
    prefill = [model["points"][1]["parts"]["attention"]["flops"] for model in found["models"]]
    assert prefill[0] == prefill[1] == prefill[2]
    cache = [model["points"][-1]["parts"]["attention"]["cache_bytes"] for model in found["models"]]
    assert cache[0] == 8 * cache[1] == 64 * cache[2]


def test_a_windows_cache_never_reaches_the_weights():
    model = small(1, n_layers=2, window=8)
    crossings = roofline_findings(model, [4, 1], [1], [16], ceilings())["models"][1]["crossings"]
    assert crossings["cache_equals_weights"] == {"1": None} and crossings["attention_equals_products"] is None


def test_what_fits_is_memory_less_weights_over_caches():
    model = small(1)
    weights, cache = weight_bytes(model), model.kv_cache_bytes(100)
    for room, batch in ((weights + 5 * cache, 5), (weights + 5 * cache - 1, 4), (weights - 1, 0)):
        one = roofline_findings(model, [1], [4, 5], [100], ceilings(memory_bytes=float(room)))["models"][0]
        (fit,) = one["fits"]
        assert fit["batch"] == batch
        assert [point["fits"] for point in one["points"]] == 2 * [batch >= 4, batch >= 5]
        assert (fit["tokens_per_second"] is None) == (batch == 0)
        if batch == 5:
            assert fit["tokens_per_second"] == pytest.approx(one["points"][-1]["tokens_per_second"])


def unbroken(text):
    return " ".join(text.split())


def test_the_text_says_what_the_numbers_do(found):
    text = unbroken(as_text(found))
    many, _, one = found["models"]
    step, fast = many["points"][-1], one["points"][-1]
    assert f"is {step['seconds'] / fast['seconds']:.3g} times as fast" in text
    assert "1 FLOPs a byte, where the ridge is 295: memory bounds attention" in text
    assert "MHA does not fit: weights and the cache of one sequence of 1,024 tokens take more than 75.1 GiB" in text
    assert "*: as if it fitted" in text and "From 98,817 tokens of context on attention multiplies more" in text
    assert "are the same on a rank" not in text and "Measured" not in text
    small_one = roofline_findings(small(1), [4, 1], [1], [16], ceilings(memory_bytes=None, product_flops=1.0))
    assert not any("does not fit" in line for line in conclusions(small_one)) and "*" not in as_text(small_one)
    cut = roofline_findings(preset("67b").model, [64, 8, 1], [1], [16], ceilings_of(cluster_of("h100"), 2, 8), 8)
    assert "GQA-8 and MQA are the same on a rank: 8 tensor-parallel ranks" in unbroken(as_text(cut))
    cut = roofline_findings(preset("67b").model, [64, 8, 1], [1], [16], ceilings_of(cluster_of("h100"), 2, 4), 4)
    assert "are the same on a rank" not in as_text(cut)


def test_heads_to_compare_are_the_two_ends_and_one_between():
    models = {"67b": [64, 8, 1], "7b": [32, 8, 1], "tiny_mha": [8, 4, 1], "tiny": [4, 2, 1]}
    assert {name: kv_heads_of(preset(name).model) for name in models} == models
    assert kv_heads_of(small(1, n_heads=1)) == [1]


def test_the_command_counts_measures_and_writes(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "LONGEST", 0.02)
    monkeypatch.setattr(measured, "ENOUGH", 0.0)
    shape = ["model.n_layers=2", "model.d_model=32", "model.d_ff=64", "model.n_heads=4", "model.n_kv_heads=2"]
    options = [
        "--measure",
        "--batches",
        "2,1",
        "--contexts",
        "16,8,20000",
        "--tp",
        "2",
        "--out",
        str(tmp_path / "a/b"),
    ]
    assert cli.main(["roofline", "tiny", *shape, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["preset"], found["roofline"]["tp"], found["roofline"]["dtype"]) == ("tiny", 2, "bfloat16")
    assert found["roofline"]["device"]["name"] == "H100 SXM" and found["roofline"]["contexts"] == [8, 16, 20000]
    here = found["measured"]
    assert here["tp"] == 1 and here["device"]["name"].startswith(("cpu, 1 thread", "NVIDIA"))
    assert ["prefill", 1, 20000] in here["left_out"] and here["rounds"] == 1
    for model in here["models"]:
        timed = [point for point in model["points"] if "measured_seconds" in point]
        assert {(point["phase"], point["context"]) for point in timed} >= {("prefill", 8), ("decode", 16)}
        for point in timed:
            assert point["measured_over_roofline"] == point["measured_seconds"] / point["seconds"] > 0
    files = {path.name for path in (tmp_path / "a/b").iterdir()}
    pictures = {"roofline.png", "roofline-seconds.png", "measured.png", "measured-seconds.png"}
    assert files == {"roofline.json", "roofline.txt", *pictures}
    assert all((tmp_path / "a/b" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert json.loads((tmp_path / "a/b/roofline.json").read_text()) == found
    said = unbroken((tmp_path / "a/b/roofline.txt").read_text())
    assert "Measured over roofline, decode: median" in said and "Not measured, too long or too large" in said


def test_a_prefill_is_timed_over_whole_prompts(monkeypatch):
    seen = set()
    prefill = Decoder.prefill
    monkeypatch.setattr(Decoder, "prefill", lambda self: seen.add(tuple(self._prompts_BL.shape)) or prefill(self))
    timed = seconds_by_turns({1: RandomWeights(small(1))}, {Phase.prefill: [(3, 20)]}, lambda text: None, rounds=2)
    (one,) = timed.seconds[1][Phase.prefill]
    assert seen == {(3, 20)} and (one["batch"], one["context"]) == (3, 20) and one["seconds"] > 0
    assert timed.rounds == 2


@pytest.mark.gpu
def test_a_gpu_is_measured_in_bf16():
    model = small(16, n_layers=4, d_model=2048, n_heads=16, d_ff=4096)
    models = {n: RandomWeights(replace(model, n_kv_heads=n)) for n in (16, 1)}
    found = measured.measured_findings(models, [8], [4096], lambda text: None, rounds=1)
    assert found["dtype"] == "bfloat16" and found["device"]["name"] == torch.cuda.get_device_name()
    for point in (point for model in found["models"] for point in model["points"]):
        assert point["measured_over_roofline"] > 0


def test_no_round_begins_after_the_limit(monkeypatch):
    said = []
    timed = seconds_by_turns({1: RandomWeights(small(1))}, {Phase.decode: [(1, 4)]}, said.append, rounds=5, limit=0.0)
    assert timed.rounds == 1 and "no further round of 5" in said[-1]


def test_all_that_cannot_be_is_said_at_once(capsys, tmp_path):
    (tmp_path / "file").write_text("kept")
    options = ["--device", "h1000", "--kv-heads", "3,8", "--batches", "0", "--contexts", "1,x", "--tp", "5"]
    assert cli.main(["roofline", "67b", *options, "--out", str(tmp_path / "file"), "--measure"]) == 2
    said = capsys.readouterr().err
    for line in (
        "--kv-heads=3: does not divide model.n_heads=64, and every key/value head serves equally many query heads; "
        "--kv-heads=2 or --kv-heads=4 would",
        "--batches=0: is no list of whole numbers from 1 to 16,777,216",
        "--contexts=1,x: is no list of whole numbers",
        "--tp=5: does not divide the query heads, model.n_heads=64; --tp=2 or --tp=4 would work",
        "--device=h1000: no such preset as 'h1000'; h100 would work; there are a100, b200, h100",
        f"--out={tmp_path / 'file'}: is a file",
        "--measure: the weights take 251.2 GiB in fp32",
    ):
        assert line in said
    assert (tmp_path / "file").read_text() == "kept" and "Traceback" not in said
