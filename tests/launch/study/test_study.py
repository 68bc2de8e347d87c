"""A whole study of small models in real processes, and its plan."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch.study import run as study
from launch.study.decode import decode_seconds
from launch.study.plan import StudySettings, plan
from model.problems import BadInput
from model.regroup import Method
from tests.ranks import nursery
from tests.shapes import preset
from tests.train.checkpoint import runs
from train.pretrained import open_source
from train.wandb_file import records

MULTI_HEAD = ["model.n_kv_heads=4", "train.total_tokens=5120", "schedule.warmup_steps=2", "train.val_sequences=4"]
SMALL = ["study.methods=[mean,first]", "study.alphas=[0.1,0.3]", "study.alpha=0.3", "study.kv_heads=[1]"]
QUICK = ["study.batches=[1,2]", "study.contexts=[8,16]"]


class Starts:
    """Starts ranks as the launcher would, forked; which run folders it was asked for."""

    def __init__(self, logs):
        self.logs, self.folders = logs, []

    def __call__(self, arguments, num, run_dir):
        self.folders.append(run_dir.name)
        logs = self.logs / run_dir.name
        logs.mkdir()
        codes = nursery().start("train.pretrain", num, arguments, logs).wait(120)
        assert codes == [0] * num, (logs / "rank0.log").read_text()[-4000:]
        return 0


@pytest.fixture(scope="module")
def command(overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "it's kept"
    return [*overrides, *MULTI_HEAD, *SMALL, *QUICK, "parallel.pp=2", f"study.dir={folder}"]


@pytest.fixture(scope="module")
def done(command, tmp_path_factory):
    starts = Starts(tmp_path_factory.mktemp("logs"))
    assert study.run(command, starts) == 0
    folder = plan(command).folder
    return folder, json.loads((folder / "study.json").read_text()), starts


def by_head(found):
    return {model["kv_heads"]: model for model in found["models"]}


@pytest.mark.launch
def test_every_model_is_trained_once_and_a_second_command_trains_nothing(done, command, capsys):
    folder, _, starts = done
    assert starts.folders == ["pretrained", "4-original-0.3", "1-mean-0.3", "1-first-0.3"]
    assert study.run(command, starts) == 0
    assert len(starts.folders) == 4
    said = capsys.readouterr().out
    assert "MQA: efficiency gain = (" in said and (folder / "study.txt").read_text() in said


@pytest.mark.launch
def test_losses_are_those_of_the_runs_at_their_shares(done):
    folder, found, _ = done
    # 20 steps of 8 x 32 tokens
    assert found["tokens"] == 5120
    for model, method in ((4, "original"), (1, "mean"), (1, "first")):
        curve = {r["step"]: r for r in runs.metrics(folder / "uptrained" / f"{model}-{method}-0.3")}
        assert list(curve) == [0, 1, 2, 3, 4, 5, 6] and [s for s in curve if "val_loss" in curve[s]] == [0, 2, 6]
        expected = {"0": curve[0]["val_loss"], "0.1": curve[2]["val_loss"], "0.3": curve[6]["val_loss"]}
        assert by_head(found)[model]["val_loss"][method] == expected
    # before its first step the uptraining is where the pretraining ended
    ended = json.loads((folder / "pretrained" / "summary.json").read_text())["val_loss"]
    assert by_head(found)[4]["val_loss"]["original"]["0"] == pytest.approx(ended, rel=1e-6)
    assert by_head(found)[1]["val_loss"]["mean"]["0"] != by_head(found)[1]["val_loss"]["first"]["0"]


@pytest.mark.launch
def test_uptraining_begins_with_the_heads_of_its_method(done):
    folder, _, _ = done
    original = open_source(folder / "pretrained").weights.read("blocks.2.attention.qkv.k_proj.weight")
    heads_GKD = original.unflatten(0, (4, -1))
    for method, expected in (("mean", heads_GKD.mean(0)), ("first", heads_GKD[0])):
        made = open_source(folder / "weights" / f"1-{method}")
        torch.testing.assert_close(made.weights.read("blocks.2.attention.qkv.k_proj.weight"), expected)


@pytest.mark.launch
def test_costs_are_those_of_the_shapes(done):
    _, found, _ = done
    many, one = by_head(found)[4], by_head(found)[1]
    assert many["kv_cache_bytes_per_token"] == 4 * one["kv_cache_bytes_per_token"] == 4 * 2 * 4 * 8 * 4
    assert many["parameters"] - one["parameters"] == 4 * 2 * 3 * 8 * 32
    grid = [(1, 8), (1, 16), (2, 8), (2, 16)]
    for model in (many, one):
        assert [(time["batch"], time["context"]) for time in model["decode"]] == grid
        assert all(time["seconds"] > 0 for time in model["decode"])


@pytest.mark.launch
def test_pictures_and_tables_are_kept_and_logged(done):
    folder, _, _ = done
    for name in ("loss", "tradeoff"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    (first, *_) = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    history = [r.history for r in records(first) if r.WhichOneof("record_type") == "history"]
    logged = {(item.key or item.nested_key[0]) for line in history for item in line.item}
    assert {"val_loss", "decode", "loss", "tradeoff"} <= logged


@pytest.mark.launch
def test_trained_weights_take_the_place_of_the_pretraining(done, overrides, tmp_path):
    folder, found, _ = done
    starts = Starts(tmp_path)
    more = [f'init_from="{folder / "pretrained"}"', "parallel.pp=2", "study.methods=[mean]", "study.kv_heads=[2]"]
    more += ["study.alphas=[0.3]", "study.alpha=0.3", *QUICK, f"study.dir={tmp_path / 'other'}"]
    assert study.run(more, starts) == 0
    assert starts.folders == ["4-original-0.3", "2-mean-0.3"]
    other = json.loads((tmp_path / "other" / "study.json").read_text())
    assert other["tokens"] == 5120
    assert by_head(other)[4]["val_loss"]["original"]["0.3"] == by_head(found)[4]["val_loss"]["original"]["0.3"]


def test_a_schedule_that_runs_again_is_a_run_for_each_share(command):
    held, again = plan(command), plan([*command, "uptrain.rate=again"])
    kinds = [(4, None), (1, Method.mean), (1, Method.first)]
    assert [(run.kv_heads, run.method, run.steps) for run in held.uptrainings(5120)] == [(*k, (2, 6)) for k in kinds]
    found = [(run.kv_heads, run.method, run.steps) for run in again.uptrainings(5120)]
    assert found == [(*kind, (step,)) for kind in kinds for step in (2, 6)]
    assert "uptrain.rate=again" in again.overrides(again.uptrainings(5120)[0], again.folder)
    shared = again.overrides(again.uptrainings(5120)[0], again.folder)
    assert any(text.startswith("data.cache_dir=") for text in shared) and "parallel.pp=2" in shared
    assert not any(text.startswith(("model.", "optimizer.", "train.total_tokens")) for text in shared)


@pytest.mark.launch
def test_a_study_of_trained_weights_is_kept_under_their_name(done):
    folder, _, _ = done
    assert plan([f'init_from="{folder / "pretrained"}"', *SMALL]).folder == Path("runs/gqa-pretrained")
    assert plan([f'init_from="{folder / "weights" / "1-mean"}"', *SMALL]).folder == Path("runs/gqa-1-mean")


def test_null_is_every_divisor(overrides, tmp_path):
    found = plan([*overrides, *MULTI_HEAD, f"study.dir={tmp_path / 'all'}", "study.alphas=[0.05,0.3]"])
    assert found.kv_heads == [4, 2, 1]
    assert len(found.uptrainings(5120)) == 1 + 2 * 3


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["study.kv_heads=[3]"], "study.kv_heads=3: does not divide the 4 key/value heads"),
        (["study.methods=[median]"], "study.methods=[median]: "),
        (["study.alpha=0.2"], "study.alpha=0.2: not one of study.alphas=[0.1, 0.3]"),
        (["study.alphas=[0.26,0.3]"], "0.26 and 0.3 are both 6 steps of training"),
        (["study.alphas=[0.0,0.3]"], "at least one share above 0"),
        (["study.batches=[]"], "study.batches=[]: at least one number"),
        (["study.contexts=[0]"], "study.contexts=[0]: at least one number, each at least 1"),
        (["study.heads=2"], "study.heads=2: no such key; there are study.kv_heads, study.methods"),
        (["hydra.run.dir=/elsewhere"], "hydra.run.dir: is the study's to set; study.dir="),
        (["uptrain.alpha=0.1"], "uptrain.alpha: is the study's to set"),
        (["model.n_heads=5"], "model.n_kv_heads=4: does not divide model.n_heads=5"),
        (["parallel.pp=99"], "parallel.pp=99: more stages than the 4 layers"),
        (["data.val_fraction=0"], "data.val_fraction=0: a study measures the loss on held-out documents"),
        (["init_from=/nowhere"], "/nowhere: no weights are there"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(wrong, said, command, tmp_path):
    starts = Starts(tmp_path)
    with pytest.raises(BadInput) as error:
        study.run([*command, f"study.dir={tmp_path / 'none'}", *wrong], starts)
    assert any(said in problem for problem in error.value.problems), error.value.problems
    assert starts.folders == [] and not (tmp_path / "none" / "weights").exists()


def test_several_mistakes_are_said_together(command, tmp_path):
    with pytest.raises(BadInput) as error:
        plan([*command, f"study.dir={tmp_path}", "study.heads=2", "train.global_batch=0"])
    assert [problem.partition("=")[0] for problem in error.value.problems] == ["study.heads", "train.global_batch"]


def test_a_token_is_timed_at_the_context_it_stands_for(done, monkeypatch):
    """The caches hold as many tokens as they are said to, of the model's key/value heads."""
    folder, _, _ = done
    from model.cache import KVCache

    seen = set()
    held = KVCache.held
    monkeypatch.setattr(KVCache, "held", lambda cache: seen.add(tuple(held(cache)[0].shape)) or held(cache))
    decode_seconds({1: open_source(folder / "weights" / "1-mean").weights}, [3], [20], lambda text: None, rounds=1)
    assert seen == {(3, 1, 20 + step, 8) for step in range(1, 10)}


def test_a_study_that_does_not_log_to_wandb_does_not_need_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = preset("tiny", "wandb.mode=disabled")
    study._log(SimpleNamespace(config=config, settings=StudySettings(), folder=tmp_path), {"models": []}, [])
