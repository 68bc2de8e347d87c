"""`deepnarrow bench`: small models, and every number that can be known otherwise."""

import importlib.util
import json
import math
import os
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F

from launch.bench import ALL, SUBJECTS, contenders, data, documents, kernels, peers, pipeline, stage, suite
from launch.bench.common import RandomWeights, composed
from launch.bench.preparation import PREPARERS
from launch.bench.schedules import micro_batches_of
from launch.cli import main
from model.problems import BadInput
from model.weights import streamed_logits
from parallel.schedules import ONE_F_ONE_B, placement_of
from parallel.stages import split_for
from tests.shapes import preset, small
from tests.spawned import spawn

SHAPE = [
    *["model.n_layers=4", "model.d_model=64", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=96"],
    *["model.vocab_size=400", "model.max_seq_len=64", "train.seq_len=32", "train.micro_batch=2", "model.init_std=0.2"],
]


def loss_of(config, tokens, labels, std):
    return float(F.cross_entropy(streamed_logits(RandomWeights(config, std), tokens).flatten(0, 1), labels.flatten()))


# ---- all of them ----


@pytest.fixture(scope="module")
def all_found(corpus, tmp_path_factory):
    """What `deepnarrow bench` writes where nobody says where to, on small models, and what it prints."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(stage, "ON_CPU", [("8x512", 2, True)])
        patch.setattr(stage, "SMALL", SHAPE)
        patch.setattr(kernels, "ON_CPU", [*SHAPE, "model.head_dim=16"])
        patch.setattr(documents, "ON_CPU", SHAPE)
        patch.setattr(peers, "DEFAULTS", SHAPE)
        patch.setattr(pipeline, "DEFAULTS", SHAPE)
        patch.setattr(data, "DEFAULTS", [*SHAPE, "data=files", f"data.path={corpus}", "data.val_fraction=0.2"])
        patch.setattr(data, "ROUNDS", 1)
        patch.setattr(data, "measure", partial(data.measure, seconds=0.2))
        patch.setattr(torch.multiprocessing, "spawn", spawn)
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        printed = []
        assert main(["bench"]) == 0
    (path,) = folder.iterdir()
    assert path.name == "bench.json"
    return json.loads(path.read_text("utf-8")), "\n".join(printed)


@pytest.mark.launch
def test_without_a_subject_all_run_into_one_file(all_found):
    record, printed = all_found
    assert list(record["subjects"]) == list(ALL)
    assert record["torch"] == torch.__version__ and record["threads"] == torch.get_num_threads()
    assert abs((datetime.now().astimezone() - datetime.fromisoformat(record["date"])).total_seconds()) < 3600
    assert record["device"].startswith("cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name())
    places = [
        printed.index(said)
        for said in ("training a stage", "kernels: ", "documents: ", "peers: ", "1f1b, 8 micro", "a rank loads")
    ]
    assert places == sorted(places)
    for found in record["subjects"].values():
        assert found["wall_seconds"] > 0


@pytest.mark.launch
def test_two_stages_compute_what_one_process_does(all_found):
    found = all_found[0]["subjects"]["pipeline"]
    config = preset(*SHAPE).model
    batches = [*micro_batches_of(config, 32, 8)]
    tokens, labels = (torch.cat([getattr(batch, key) for batch in batches]) for key in ("tokens", "labels"))
    assert found["loss"] == pytest.approx(loss_of(config, tokens, labels, 0.02), abs=1e-5)
    assert found["loss_difference"] < 1e-5 and found["gradient_difference"] < 1e-4
    assert found["parameters"] == config.num_params
    assert found["bound"] == 8 / 9
    assert found["ratios"][0] <= found["ratio"] <= found["ratios"][1]
    assert found["speedup"] == found["seconds"]["one core"] / found["seconds"]["two stages"]
    assert 0 < found["bubble"] < 1 and 0 < found["bubble_expected"] < 0.5


def test_an_interruption_keeps_what_there_is(monkeypatch, tmp_path):
    def interrupted(overrides):
        raise KeyboardInterrupt

    def measured(overrides):
        assert list(overrides) == []
        return {"seconds": 2.0}

    for module in (stage, kernels, documents, peers):
        monkeypatch.setattr(module, "measure", measured)
        monkeypatch.setattr(module, "as_text", str)
    monkeypatch.setattr(pipeline, "measure", interrupted)
    out = tmp_path / "found.json"
    assert main(["bench", "--out", str(out)]) == 130
    record = json.loads(out.read_text("utf-8"))
    assert list(record["subjects"]) == ["stage", "kernels", "documents", "peers"]
    assert record["subjects"]["peers"]["seconds"] == 2.0
    assert list(tmp_path.iterdir()) == [out]


def test_a_subject_alone_takes_overrides_and_writes_only_when_asked(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "measure", lambda overrides: {"given": list(overrides)})
    monkeypatch.setattr(data, "as_text", lambda found: f"was given {found['given']}")
    assert main(["bench", "data", "model=7b", "--json", "train.seq_len=64"]) == 0
    assert json.loads(capsys.readouterr().out) == {"given": ["model=7b", "train.seq_len=64"]}
    assert not list(tmp_path.iterdir())
    assert main(["bench", "data", "model=7b", "--out", "one.json"]) == 0
    assert capsys.readouterr().out == "was given ['model=7b']\n"
    assert list(json.loads((tmp_path / "one.json").read_text())["subjects"]) == ["data"]


def test_json_of_all_is_what_the_file_holds(monkeypatch, tmp_path, capsys):
    for module in (stage, kernels, documents, peers, pipeline, data):
        monkeypatch.setattr(module, "measure", lambda overrides, name=module.__name__: {"of": name})
    assert main(["bench", "--json", "--out", str(tmp_path / "all.json")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "all.json").read_text())
    assert [found["of"] for found in said["subjects"].values()] == [f"launch.bench.{name}" for name in ALL]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=7b"], "model=7b: overrides are only taken with a subject"),
        (["peer"], "peer: no such benchmark; one of " + ", ".join(SUBJECTS)),
        (["--out", "nowhere/bench.json"], "--out=nowhere/bench.json: cannot be written"),
        (["data", "--out", "."], "--out=.: is a folder"),
        (["data", "model.n_kv_heads=3"], "model.n_kv_heads=3"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_measured(words, said, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---- peers ----


@pytest.fixture(scope="module")
def compared():
    return peers.measure(SHAPE, rounds=3)


@pytest.mark.parametrize("name", list(contenders.PEERS))
def test_a_peer_with_our_weights_is_the_same_model(name, compared):
    if compared["absent"].get(name) == "not installed":
        assert name != "transformers", "it is in the dev extra"
        pytest.skip(f"{name} is not installed")
    assert name in compared["peers"], compared["absent"]
    found, ours = compared["peers"][name], compared["ours"]
    assert abs(found["loss_difference"]) < 1e-4 and abs(found["gradient_difference"]) < 1e-4
    assert found["loss"] == ours["loss"] + found["loss_difference"]
    assert found["ratio"] == found["seconds"] / ours["seconds"] > 0
    assert 0 < found["ratios"][0] < found["ratios"][1]


def test_our_loss_is_that_of_the_drawn_weights(compared):
    config = preset(*SHAPE).model
    rows = torch.randint(400, (2, 33), generator=torch.Generator().manual_seed(1))
    expected = loss_of(config, rows[:, :-1], rows[:, 1:], 0.2)
    assert compared["ours"]["loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(expected - math.log(400)) > 0.1  # weights so large that a wrong one is seen
    assert compared["parameters"] == config.num_params and compared["rounds"] == 3
    assert compared["dtype"] == "float32" and compared["tokens"] == [2, 32]


@pytest.mark.parametrize("change", [{"rope_theta": 100.0}, {"norm_eps": 0.1}, {"n_kv_heads": 4}, {"window": 5}])
def test_a_peer_that_is_another_model_is_found_out(change, monkeypatch):
    def other(config, device, dtype):
        return contenders._transformers(replace(config, **change), device, dtype)

    monkeypatch.setattr(peers, "PEERS", {"other": other})
    found = peers.measure(SHAPE, rounds=1)["peers"]["other"]
    assert abs(found["loss_difference"]) > 1e-3 and found["version"] is None


def test_a_peer_that_cannot_be_had_is_named_with_the_reason(monkeypatch):
    def unlike(config, device, dtype):
        raise TypeError("got an unexpected keyword argument 'd_ff'\nand more")

    def missing(config, device, dtype):
        import none_such  # noqa: F401

    def fails_to_run(config, device, dtype):
        return contenders.Contender(torch.nn.Linear(1, 1), lambda tokens, labels: 1 / 0, "")

    monkeypatch.setattr(peers, "PEERS", {"litgpt-of-nobody": missing, "torch": unlike, "numpy": fails_to_run})
    found = peers.measure(SHAPE, rounds=1)
    assert not found["peers"] and found["ours"]["seconds"] > 0
    assert found["absent"]["litgpt-of-nobody"] == "not installed"
    text = peers.as_text(found)
    assert f"torch: not compared, version {version('torch')}: TypeError: got an unexpected keyword" in text
    assert "numpy: not compared" in text and "ZeroDivisionError" in text and "and more" not in text


def test_a_busy_machine_gets_fewer_rounds():
    assert peers.measure(SHAPE, rounds=50, limit=0.0)["rounds"] == 2


# ---- pipeline ----


@pytest.mark.parametrize(("vocab_size", "micro_batches"), [(300, 8), (300, 1), (5000, 8)])
def test_the_bound_is_that_of_the_slower_stage_and_one_filling(vocab_size, micro_batches):
    config = small(n_layers=6, vocab_size=vocab_size)
    costs = [float(flops) for flops in config.layer_flops(64)]
    share = max(stage.cost_share for stage in split_for(costs, placement_of(ONE_F_ONE_B, 2, None)))
    expected = micro_batches / (micro_batches * share + 1 - share)
    assert pipeline.speedup_bound(config, 64, micro_batches) == pytest.approx(expected)
    if micro_batches == 1:
        assert expected == 1


# ---- data ----


def test_consumption_of_a_cluster():
    found = data.consumption(preset(*data.CLUSTER), "H100", 0.4)
    # 95 blocks: 2 x (8192 x 128 x (2 x 64 + 2 x 8) + 3 x 8192 x 22016) + 2 x 8192 x 4096; the head 2 x 8192 x 102400.
    block = 2 * (8192 * 128 * 144 + 3 * 8192 * 22016) + 2 * 8192 * 4096
    assert found["flops_per_token"] == 3 * (95 * block + 2 * 8192 * 102400)
    assert found["tokens_per_second"] == pytest.approx(1024 * 989e12 * 0.4 / found["flops_per_token"])
    assert found["tokens_per_second_of_a_rank"] == pytest.approx(found["tokens_per_second"] / 16)
    assert (found["gpus"], found["replicas"], found["reading_ranks"]) == (1024, 16, 16 * 8 * 2)
    whole = data.consumption(preset("model=tiny", "parallel.tp=2", "parallel.dp=4"), "A100", 0.5)
    assert (whole["gpus"], whole["reading_ranks"]) == (8, 8)


@pytest.mark.launch
def test_preparation_and_loading_against_consumption(all_found):
    found = all_found[0]["subjects"]["data"]
    trained, there = found["preparation"]["tokenizer trained"], found["preparation"]["tokenizer there"]
    for one in (trained, there):
        assert one["seconds"] * one["tokens_per_second"] == pytest.approx(found["corpus"]["tokens"])
    assert found["corpus"]["bytes"] / 4 < found["corpus"]["tokens"] < found["corpus"]["bytes"]
    assert found["vocabulary"] == 400
    rows = found["preparers"]["rows"]
    cores = {1, len(os.sched_getaffinity(0))}
    assert {(row["name"], row["cores"]) for row in rows} >= {("deepnarrow", number) for number in cores}
    assert len({row["tokens"] for row in rows}) == 1 and rows[0]["tokens"] <= found["corpus"]["tokens"]
    assert all(row["tokens_per_cpu_second"] == row["tokens"] / row["cpu_seconds"] for row in rows)
    missing = {name for name, (_, package) in PREPARERS.items() if importlib.util.find_spec(package) is None}
    assert found["preparers"]["absent"].keys() == missing and {"deepnarrow"}.isdisjoint(missing)
    loading, cluster = found["loading"], found["cluster"]
    assert loading["tokens"] % 32 == 0 and loading["tokens_per_second"] == loading["tokens"] / loading["seconds"]
    assert cluster["times_loading"] == loading["tokens_per_second"] / cluster["tokens_per_second_of_a_rank"]
    a_core = there["tokens_per_second"] / found["cores"]
    assert cluster["core_hours"] == pytest.approx(2e12 / a_core / 3600)
    assert cluster["cores_to_tokenise"] == pytest.approx(cluster["tokens_per_second"] / a_core)


def test_a_tokenizer_that_is_given_is_not_trained(corpus, tmp_path, monkeypatch):
    from train.data.tokenizer import train_tokenizer

    train_tokenizer(iter(["def f(x): return x"] * 9), 290).save(str(tmp_path / "tokenizer.json"))
    overrides = [*SHAPE, "data=files", f"data.path={corpus}", f"data.tokenizer={tmp_path}", "data.val_fraction=0"]
    monkeypatch.setattr(data, "ROUNDS", 1)
    found = data.measure(overrides, seconds=0.1, cluster=["model=7b", "parallel.pp=4"], gpu="A100", mfu=1.0)
    assert list(found["preparation"]) == ["tokenizer there"] and found["vocabulary"] <= 290
    assert "4 x A100 on 7b at 100% MFU" in data.as_text(found)
    assert found["corpus"]["bytes"] == sum(path.stat().st_size for path in corpus.iterdir())


def test_what_is_no_one_corpus_of_text_is_not_prepared_for_a_measure(corpus):
    tokens = ["data=tokens", f"data.path={corpus}", "data.token_dtype=uint16", f"data.tokenizer={corpus}"]
    with pytest.raises(BadInput, match="one corpus is measured at a time"):
        data.measure([*SHAPE, f"data.sources={{a: {{path: {corpus}}}}}"])
    with pytest.raises(BadInput, match="preparation is measured on text"):
        data.measure([*SHAPE, *tokens])


def test_every_preparation_has_the_cores(corpus, monkeypatch):
    """A preparation turns the tokenizer's threads off when it ends, in the process that it ran in."""
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    found, real = [], data.prepare

    def prepare(*arguments, **options):
        found.append(os.environ.get("TOKENIZERS_PARALLELISM"))
        return real(*arguments, **options)

    monkeypatch.setattr(data, "prepare", prepare)
    monkeypatch.setattr(data, "compare", lambda *_: {})
    data.measure([*SHAPE, "data=files", f"data.path={corpus}", "data.val_fraction=0"], seconds=0.1)
    assert found == [None, None]


def test_an_unknown_gpu_is_refused():
    with pytest.raises(BadInput, match="gpu=H9000: its peak is not known; one of A100"):
        data.measure(SHAPE, gpu="H9000")


def test_a_benchmarks_own_shape_gives_way_to_a_preset_that_the_user_names():
    defaults = ["model.d_model=512", "model.n_heads=8", "model.n_kv_heads=8", "train.seq_len=64"]
    assert composed(defaults, []).config.model.d_model == 512
    config = composed(defaults, ["model=7b", "model.n_layers=4"]).config
    assert (config.model.d_model, config.model.n_layers, config.train.seq_len) == (4096, 4, 64)


def test_facts_of_the_record():
    assert suite.facts()["subjects"] == {} and suite.facts()["load_before"] >= 0


# ---- stage, kernels ----


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("recompute", "pieces"), [("none", 1), ("selective", 4), ("ffn", 1), ("full", 4)])
def test_the_memory_of_a_step_is_what_is_predicted(precision, recompute, pieces, monkeypatch):
    monkeypatch.setattr(stage, "product_flops", lambda device, dtype: 1e12)
    shape = ["model.d_model=256", "model.n_heads=8", "model.n_kv_heads=2", "model.d_ff=768", "model.vocab_size=4096"]
    how = [f"train.precision={precision}", f"parallel.recompute={recompute}", f"parallel.head_pieces={pieces}"]
    cases = [("8x512", 4, True), ("8x512", 3, False)]
    found = stage.measure([*shape, *how, "train.seq_len=512"], cases, micro_batches=2, rounds=1)
    for row in found["rows"]:
        # What is predicted is a GPU's; on a CPU, formulas that are not compiled hold what they make on the way.
        assert 0.93 < row["predicted_bytes"] / row["peak_bytes"] < 1.05, row
        assert row["tokens_per_second"] == pytest.approx(2 * 512 / row["seconds"])
    assert "sdpa" in found["kernels"] and "8x512, 3 blocks" in stage.as_text(found).replace("\n", " ")


@pytest.mark.gpu
@pytest.mark.parametrize(("recompute", "pieces"), [("none", 1), ("selective", 4), ("ffn", 1), ("full", 4)])
def test_a_gpu_allocates_what_is_predicted(recompute, pieces):
    how = [f"parallel.recompute={recompute}", f"parallel.head_pieces={pieces}", "train.micro_batch=1"]
    found = stage.measure([*how, "train.seq_len=2048"], [("7b", 2, True), ("7b", 2, False)], micro_batches=2, rounds=1)
    for row in found["rows"]:
        assert row["predicted_bytes"] == pytest.approx(row["peak_bytes"], rel=0.01), row


def test_the_flops_of_a_stage_are_those_of_its_layers():
    from model.config import ModelConfig

    shape = ["model.d_model=64", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=128", "model.vocab_size=512"]
    found = stage.measure([*shape, "train.seq_len=64"], [("8x512", 2, True), ("8x512", 2, False)], 1, rounds=1)
    config = ModelConfig(d_model=64, n_heads=4, n_kv_heads=2, d_ff=128, vocab_size=512)
    blocks = 3 * 2 * config.block_flops(64)
    whole, middle = (row["flops"] * row["seconds"] / 64 for row in found["rows"])
    assert whole == pytest.approx(blocks + 3 * config.head_flops) and middle == pytest.approx(blocks)


def test_kernels_are_measured_each_way_and_say_what_is_absent():
    shape = ["model.d_model=64", "model.n_heads=4", "model.n_kv_heads=2", "model.head_dim=16", "model.d_ff=128"]
    found = kernels.measure([*shape, "model.vocab_size=64", "train.seq_len=32"], models=["7b"], rounds=1)
    ways = {}
    for row in found["rows"]:
        ways.setdefault(row["kernel"], []).append(row["way"])
        assert row["rate"] > 0 and row["share"] > 0
    assert ways.pop("attention, 4 heads on 2") == ["sdpa"]
    between = ["norm", "add, norm", "rotary", "SwiGLU", "loss"]
    assert ways == {name: ["pytorch", "plain", "compiled"] for name in between}
    assert found["absent"].keys() == {"flash2", "flash3", "flash4", "liger"}
    assert "flash-attn 2 runs on GPUs" in kernels.as_text(found)
