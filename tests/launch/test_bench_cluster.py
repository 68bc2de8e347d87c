"""This machine's figures as a cluster: measured on small models, and what follows from figures that are known."""

import json

import pytest
import torch
import yaml

from conf.clusters import cluster_from_file
from launch import cluster_file
from launch.bench import calibration, cluster, layouts
from launch.bench.calibration import Pass, layers_for, predicted, tensor_parallel_sizes
from launch.bench.layouts import Case, kendall_tau
from launch.check.measure import LinkTime, RankFindings
from launch.cli import main
from parallel.plan.cluster import Cluster
from parallel.plan.costs import Prices
from parallel.plan.operations import Attention, Product, Traffic
from tests.shapes import preset
from tests.spawned import spawn

SHAPE = [
    *["model.n_layers=2", "model.d_model=64", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=96"],
    *[
        "model.vocab_size=400",
        "model.max_seq_len=64",
        "train.seq_len=32",
        "train.micro_batch=2",
        "train.global_batch=8",
    ],
]
LAYOUTS = (Case(pp=2, micro_batch=2), Case(dp=2, recompute="full"), Case(tp=2), Case(pp=2, schedule="zbv"))


# ---- real measurements ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What `deepnarrow bench --save` measures of a small model, and the file of it."""
    path = tmp_path_factory.mktemp("cluster") / "cluster.yaml"
    path.write_text("price_per_gpu_hour: 2.5\nhbm_share: 0.125\nnodes: 3\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.multiprocessing, "spawn", spawn)
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        printed = []
        assert main(["bench", "--save", str(path), "--json", *SHAPE]) == 0
    return json.loads(printed[0]), path, printed[-1]


@pytest.mark.launch
def test_every_product_of_the_model_is_measured_in_all_its_forms(saved):
    found, _, _ = saved
    shapes = {tuple(row[:3]) for row in found["values"]["products"]}
    tokens, d, q, kv, ff, vocab = 64, 64, 64, 32, 96, 400
    for tp in (1, 2, 4):
        for d_in, width in (
            (d, q // tp),
            (d, max(kv // tp, 16)),
            (q // tp, d),
            (d, ff // tp),
            (ff // tp, d),
            (d, vocab // tp),
        ):
            assert {(tokens, d_in, width), (tokens, width, d_in), (width, tokens, d_in)} <= shapes, (tp, d_in, width)
    assert all(row[3] > 0 for row in found["values"]["products"])


@pytest.mark.launch
def test_the_file_is_a_cluster_that_says_what_was_measured(saved):
    found, path, said = saved
    written = cluster_from_file(path)
    assert set(written.measured) == set(found["values"])
    assert {"products", "attention_forward_share", "hbm_share", "launch_us"} <= set(written.measured)
    assert not {"name", "nodes", "devices_per_node", "price_per_gpu_hour"} & set(written.measured)
    # What nobody measured stays, what was measured is replaced and said.
    assert (written.price_per_gpu_hour, written.nodes) == (2.5, 3) and written.hbm_share != 0.125
    assert said.endswith("; replaced there: hbm_share")
    assert written.devices_per_node == written.gpus_per_node == found["processes"]
    assert written.products == found["values"]["products"]


@pytest.mark.launch
def test_the_costs_explain_the_passes_that_were_measured(saved):
    found, _, _ = saved
    # Of the whole model, which has two blocks.
    measured, expected = (sum((1 + ("block" in row[0])) * row[at] for row in found["passes"]) for at in (1, 2))
    assert [row[0] for row in found["passes"]][2:4] == ["block, forward", "block, backward"]
    if 0.01 < found["values"]["hbm_share"] < 1:  # else no bandwidth up to a copy's explains them
        assert expected == pytest.approx(measured, rel=0.25)  # of medians over two processes


@pytest.mark.gpu
def test_a_gpu_is_a_cluster_whose_costs_explain_its_passes():
    found = cluster.measure([*SHAPE, "model.head_dim=64", "train.seq_len=64"])
    own = Cluster(**{**found["facts"], **found["values"]})
    assert own.problems() == [] and own.has_gpus and found["precision"] == "bfloat16"
    assert 0 < own.launch_us < own.host_us
    if 0.01 < own.hbm_share < 1:
        measured, expected = (sum((1 + ("block" in row[0])) * row[at] for row in found["passes"]) for at in (1, 2))
        assert expected == pytest.approx(measured, rel=0.05)


@pytest.fixture(scope="module")
def compared():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_ROTATED", 1)
        patch.setattr(torch.multiprocessing, "spawn", spawn)
        return layouts.measure(SHAPE, LAYOUTS, rounds=1)


@pytest.mark.launch
def test_layouts_are_measured_and_predicted_by_what_their_ranks_found(compared):
    assert [row["case"] for row in compared["rows"]] == list(map(str, LAYOUTS))
    config = preset(*SHAPE)
    values = compared["clusters"]["2"]
    assert {"products", "intra_gb_per_s", "protocols", "hbm_share"} <= set(values)
    place = {"gpus_per_node": 2, "devices_per_node": 2.0}
    own = Cluster(**{**cluster.facts(torch.device("cpu"), values), **values, **place})
    for row, case in zip(compared["rows"], LAYOUTS, strict=True):
        assert row["predicted"] == pytest.approx(layouts.predict(case.job(config), own).seconds)
        assert row["ratio"] == row["predicted"] / row["measured"] > 0
        assert row["extremes"][0] <= row["measured"] <= row["extremes"][1]
        if case.pp > 1:
            assert (row["terms"]["weights"][0] > 0) == (row["terms"]["weights"][1] > 0) == (case.schedule == "zbv")
            assert sum(measured for measured, _ in row["terms"].values()) < row["measured"]
    assert compared["worst"] == max(abs(row["ratio"] - 1) for row in compared["rows"])
    assert -1 <= compared["tau"] <= 1 and compared["tokens"] == 256
    assert layouts.as_text(compared).count("│ 2 ") >= len(LAYOUTS)


# ---- what follows from known figures ----


def test_the_bandwidth_is_what_explains_the_rest_of_the_passes():
    values = {"peak_fp32_tflops": 0.1, "product_share": 1.0, "products": [[64.0, 64.0, 64.0, 0.08]], "host_us": 0.0}
    values |= {"hbm_gb_per_s": 20.0, "launch_us": 10.0}
    operations = [Product(64, 64, 64, bytes_per_value=4), Traffic(10**6), Traffic(3 * 10**6)]
    seconds = 2 * 64**3 / 0.08e12 + 3 * 10e-6 + 4e6 / 5e9
    share = calibration.traffic_share(values, [Pass("one", seconds, operations)], torch.float32)
    assert share == pytest.approx(5 / 20, rel=1e-3)
    twice = [Pass("block", seconds, operations, 7), Pass("head", seconds + 2e-3, [Traffic(10**6)])]
    weighed = calibration.traffic_share(values, twice, torch.float32)
    rest = 7 * 4e6 / 5e9 + seconds + 2e-3 - 10e-6
    assert weighed * 20e9 == pytest.approx((7 * 4e6 + 1e6) / rest, rel=1e-3)
    one = Pass("one", seconds, operations)
    own = Cluster(**values, hbm_share=share, tile_units=0)
    assert predicted(one, own, torch.float32) == pytest.approx(seconds, rel=1e-3)


def test_passes_shorter_than_their_products_leave_a_copys_bandwidth():
    values = {"peak_fp32_tflops": 0.1, "product_share": 1.0, "host_us": 0.0, "hbm_gb_per_s": 20.0, "launch_us": 0.0}
    one = Pass("one", 1e-9, [Product(64, 64, 64, bytes_per_value=4), Traffic(10**6)])
    assert calibration.traffic_share(values, [one], torch.float32) == 1.0


@pytest.mark.parametrize("half", [0.0, 700.0])
def test_attention_is_priced_as_it_was_measured(half, monkeypatch):
    rates = {1024: (60.0, 40.0), 2048: (60.0, 40.0)}
    config = preset("tiny", "model.n_heads=2", "model.d_model=128", "train.seq_len=2048", "model.max_seq_len=2048")
    best = {length: length / (length + half) for length in rates}

    def seconds_of(run, device, clock):
        calls.append(run)
        length, backward = (1024, 2048)[(len(calls) - 1) // 2], (len(calls) - 1) % 2
        flops = Attention(1, length, 2, config.model.n_kv_heads, 64, bool(backward)).flops
        return flops / (1e9 * rates[length][backward] * best[length])

    calls = []
    monkeypatch.setattr(calibration, "seconds_of", seconds_of)
    found = calibration.measured_attention(config, torch.device("cpu"), torch.float32, lambda: None)
    assert found["half_length"] == pytest.approx(half, abs=1)
    assert found["forward"] == pytest.approx(60e9 * best[2048]) and found["backward"] == pytest.approx(
        40e9 * best[2048]
    )


def test_a_device_that_was_measured_is_priced_by_its_figures(monkeypatch):
    config = preset("tiny", "train.seq_len=256")
    monkeypatch.setattr(calibration, "measured_products", lambda *_: [[256.0, 256.0, 256.0, 0.05]])
    monkeypatch.setattr(calibration, "product_flops", lambda *_: 0.1e12)
    rates = {"forward": 0.02e12, "backward": 0.03e12, "half_length": 100.0}
    monkeypatch.setattr(calibration, "measured_attention", lambda *_: rates)
    monkeypatch.setattr(calibration, "copy_bytes", lambda *_: 8e9)
    monkeypatch.setattr(calibration, "host_seconds", lambda *_: 20e-6)
    monkeypatch.setattr(calibration.Passes, "measure", lambda self, together: [Pass("one", 1.0, [Traffic(4 * 10**9)])])
    values, passes = calibration.values_of_device(config, torch.device("cpu"), torch.float32, 1, lambda: None)
    assert values["crowded_share"] == 1.0
    own = Cluster(**values, hbm_share=calibration.traffic_share(values, passes, torch.float32), tile_units=0)
    prices, model = Prices(own, 4), config.model
    for backward, rate in ((False, 0.02e12), (True, 0.03e12)):
        one = Attention(1, 256, model.n_heads, model.n_kv_heads, model.d_head, backward)
        assert prices.attention(one) == pytest.approx(one.flops / rate + 20e-6, rel=1e-3)
    assert prices.product(Product(256, 256, 256, bytes_per_value=4)) == pytest.approx(2 * 256**3 / 0.05e12 + 20e-6)
    assert prices.traffic(4e9) == pytest.approx(1.0, rel=1e-3) and own.hbm_share == pytest.approx(0.5, rel=1e-3)
    assert own.problems() == []


def test_shapes_are_those_of_each_cut_that_works():
    model = preset(*SHAPE).model
    assert tensor_parallel_sizes(model, 8) == [1, 2, 4]  # of 4 heads
    assert tensor_parallel_sizes(model, 3) == [1, 2]
    products = {
        (one.k, one.n) for one in layers_for(preset(*SHAPE), 2, False).block.forward if isinstance(one, Product)
    }
    assert products == {(64, 32), (64, 16), (32, 64), (64, 48), (48, 64)}


def test_what_processes_measured_is_merged_by_medians_and_explained_once():
    config = preset(*SHAPE)
    base = {"peak_fp32_tflops": 0.1, "product_share": 1.0, "hbm_gb_per_s": 8.0, "tile_units": 0}
    of = [
        {"values": base | {"launch_us": us, "products": [[64.0, 64.0, 64.0, rate]]}, "passes": [1e-6 * us] * 6}
        for us, rate in ((1e4, 0.05), (3e4, 0.07), (9e4, 0.06))
    ]
    found = cluster.merged(of, config, torch.float32)
    values = found["values"]
    assert (values["launch_us"], values["products"]) == (3e4, [[64.0, 64.0, 64.0, 0.06]])
    assert [row[0] for row in found["passes"]][:3] == ["embedding, forward", "embedding, backward", "block, forward"]
    assert [row[1] for row in found["passes"]] == [0.03] * 6
    # The merged figures decide what is left for kernels bound by memory, not the mean of what each would say.
    passes = calibration.passes_of(config, torch.float32, [0.03] * 6)
    assert values["hbm_share"] == calibration.traffic_share(values, passes, torch.float32)
    assert [one.times for one in passes] == [1, 1, 2, 2, 1, 1]


def test_a_core_alone_is_as_fast_as_it_was_measured_alone(monkeypatch):
    rates = iter([8e9, 10e9])
    monkeypatch.setattr(calibration, "product_flops", lambda *_: next(rates))
    begun = []
    share = calibration._crowded_share(torch.device("cpu"), torch.float32, lambda: begun.append(1), 1, 2)
    assert share == 0.8 and len(begun) == 4  # all, then one after another, then on together


def test_a_message_takes_its_mean_over_ranks_that_wait_for_each_other():
    def of(rank, seconds):
        links = [LinkTime("tp", "all_gather", (0, 1), 4096, seconds), LinkTime("tp", "all_reduce", (0, 1), 4096, 1.0)]
        return RankFindings(rank, "here", "cpu", 0.0, 0.0, links)

    found = layouts.averaged([of(0, 1.0), of(1, 3.0)])
    assert [(link.operation, link.seconds) for link in found] == [("all_gather", 2.0), ("all_reduce", 1.0)]


def test_layouts_are_ranked_where_their_steps_were_measured_apart():
    def row(low, measured, high, predicted):
        return {"extremes": [low, high], "measured": measured, "predicted": predicted}

    rows = [row(1.0, 1.1, 1.2, 1.0), row(1.3, 1.4, 1.5, 1.2), row(1.4, 1.45, 1.6, 1.1), row(2.0, 2.1, 2.2, 1.15)]
    # The second and the third overlap; of the five others, the second and the fourth are predicted the other way round.
    assert layouts.told_apart(rows) == {"pairs": 5, "of": 6, "tau": pytest.approx(3 / 5)}
    assert layouts.told_apart(rows[:1]) == {"pairs": 0, "of": 0, "tau": None}


def test_kendalls_tau_counts_pairs():
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert kendall_tau([1], [1]) == 1.0


def test_steps_that_others_disturb_do_not_count_where_there_are_any_without():
    assert layouts.undisturbed([(2.0, 0.01), (9.0, 0.4), (2.1, layouts.UNDISTURBED)]) == [(2.0, 0.01), (2.1, 0.04)]
    assert layouts.undisturbed([(5.0, 0.5), (4.0, 0.2), (9.0, 0.3)]) == [(4.0, 0.2)]


def test_a_case_is_the_job_that_its_ranks_train():
    config = preset(*SHAPE)
    job = Case(pp=2, tp=2, schedule="interleaved", virtual=2, micro_batch=2, recompute="full").job(config)
    assert (job.layout.world_size, job.layout.sequence_parallel, job.placement.num_stages) == (4, True, 4)
    assert job.settings.accumulation == 4 and job.tokens_per_step == 256
    assert str(Case(pp=2, dp=2, micro_batch=2)) == "pp2 dp2 1f1b micro-batch 2"


# ---- files and words ----


def test_a_file_keeps_what_was_not_measured_and_its_order(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("preset: h100\nintra_gb_per_s: 400\nmeasured: [intra_gb_per_s]\n")
    assert cluster_file.save(path, {"hbm_share": 0.9}, "by hand", {"name": "mine", "intra_gb_per_s": 1.0}) == []
    assert yaml.safe_load(path.read_text()) == {
        "preset": "h100", "name": "mine", "hbm_share": 0.9, "intra_gb_per_s": 400,
        "measured": ["hbm_share", "intra_gb_per_s"],
    }  # fmt: skip
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["stage", "--save", "c.yaml"],
            "--save=c.yaml: stage measures no cluster; deepnarrow bench cluster --save c.yaml",
        ),
        (["--save", "c.json"], "--save=c.json: is to be YAML; c.yaml would work"),
        (["--save", "bad.yaml"], "--save=bad.yaml: cluster.gpus: is no key of a cluster"),
        (["--save", "."], "--save=.: is a folder"),
        (["layouts", "train.global_batch=3"], "train.global_batch=3: is no multiple of"),
        (
            ["layouts", "model.d_model=96", "model.n_heads=3", "model.n_kv_heads=1"],
            "parallel.tp=2: does not divide the query heads",
        ),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_measured(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("gpus: 8\n")
    monkeypatch.setattr(torch.multiprocessing, "spawn", lambda *_: pytest.fail("measured"))
    assert main(["bench", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_file_in_a_folder_that_is_not_there_yet_is_written(tmp_path):
    path = tmp_path / "clusters" / "mine.yaml"
    assert cluster_file.save_problems(path) == []
    cluster_file.save(path, {"hbm_share": 0.9}, "by hand")
    assert yaml.safe_load(path.read_text())["hbm_share"] == 0.9


@pytest.mark.launch
def test_the_passes_of_a_block_count_as_often_as_there_are_blocks():
    config = preset(*SHAPE, "model.n_layers=5")
    passes = calibration.Passes(config, torch.device("cpu"), torch.float32).measure(lambda: None)
    assert [one.times for one in passes] == [1, 1, 5, 5, 1, 1]
