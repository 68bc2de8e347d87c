"""The study of grouped-query attention: a small one from command to report, and sections that fail."""

import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from launch.study import run as study
from launch.study.findings import PARTS
from launch.study.plan import Original, plan
from launch.study.settings import Section
from launch.study.warm_starts import chain_of
from launch.trainings.starts import ForkStarter
from model.problems import BadInput
from model.regroup import Method
from tests.launch.study.small import SMALL, StandIn, small_study
from tests.launch.wandb_parts import logged_keys
from tests.ranks import nursery
from tests.train.checkpoint import runs
from train.pretrained import open_source


class Starts:
    """Starts trainings, two at a time, forked from the session's process; which run folders it was asked for."""

    slots = 2

    def __init__(self):
        self.folders, self._starter = [], ForkStarter(1, self.slots, nursery().forks)

    @contextmanager
    def __call__(self, ranks, at_once):
        yield self

    def start(self, prepared, slot):
        self.folders.append("/".join(prepared.run_dir.parts[-3:]))
        return self._starter.start(prepared, slot)


@pytest.fixture(scope="module")
def command(overrides, tmp_path_factory):
    return small_study(overrides, tmp_path_factory.mktemp("study") / "it's kept")


@pytest.fixture(scope="module")
def done(command):
    starts = Starts()
    assert study.run(command, starts) == 0
    folder = plan(command).folder
    return folder, json.loads((folder / "study.json").read_text()), starts


def of_seed(number, first):
    """The runs of a seed, uptrained for 0.3, and for 0.5 with the first one."""
    share = "0.5" if first else "0.3"
    names = [f"4-original-{share}", f"1-mean-{share}", "1-first-0.3", "4-original-0.3-w8", "1-mean-0.3-w8"]
    names += ["1-aligned-0.3", "2-mean-0.3-step1of2", "1-mean-0.3-step2of2"]
    return {f"seed-{number}/uptrained/{name}" for name in names}


@pytest.mark.launch
def test_every_model_is_trained_once_and_a_second_command_trains_nothing(done, command, capsys):
    folder, _, starts = done
    assert sorted(starts.folders[:4]) == sorted(
        f"{above}/pretrained"
        for above in ("it's kept/seed-1", "it's kept/seed-2", "seed-1/smaller-1layers", "seed-2/smaller-1layers")
    )
    smaller = {"smaller-1layers/uptrained/4-original-0.3" for _ in range(2)}
    assert set(starts.folders[4:]) == of_seed(1, True) | of_seed(2, False) | smaller
    assert len(starts.folders) == 4 + 8 + 8 + 2
    assert study.run([*command, "study.sections=[uptraining,windows]"], starts) == 0
    assert len(starts.folders) == 22
    said = capsys.readouterr().out
    assert "1-mean" not in said and "MQA after alpha = 0.3 against MHA trained on as long: loss" in said
    assert (folder / "study.txt").read_text() in said


@pytest.mark.launch
def test_losses_are_those_of_the_runs_at_their_shares(done):
    folder, found, _ = done
    # 20 steps of 8 x 32 tokens
    assert found["tokens"] == 5120
    of_heads = {model["kv_heads"]: model["val_loss"] for model in found["sections"]["uptraining"]["models"]}
    for heads, method in ((4, "original"), (1, "mean"), (1, "first")):
        for at, seed in enumerate((1, 2)):
            length = "0.5" if seed == 1 and method != "first" else "0.3"
            curve = {r["step"]: r for r in runs.metrics(folder / f"seed-{seed}/uptrained/{heads}-{method}-{length}")}
            assert [step for step in curve if "val_loss" in curve[step]] == [0, 6, 10][: 3 if length == "0.5" else 2]
            for share, step in (("0", 0), ("0.3", 6)):
                assert of_heads[heads][method][share]["values"][at] == curve[step]["val_loss"]
    assert of_heads[1]["mean"]["0.5"]["n"] == 1 and "0.5" not in of_heads[1]["first"]
    # before its first step the uptraining is where the pretraining ended
    for at, seed in enumerate((1, 2)):
        ended = json.loads((folder / f"seed-{seed}" / "pretrained" / "summary.json").read_text())["val_loss"]
        assert of_heads[4]["original"]["0"]["values"][at] == pytest.approx(ended, rel=1e-6)
    first, second = of_heads[4]["original"]["0"]["values"]
    assert first != second


@pytest.mark.launch
def test_uptraining_begins_with_the_heads_of_its_method(done):
    folder, _, _ = done
    name = "blocks.2.attention.qkv.k_proj.weight"
    original = open_source(folder / "seed-2" / "pretrained").weights.read(name)
    heads_GKD = original.unflatten(0, (4, -1))
    for method, expected in (("mean", heads_GKD.mean(0)), ("first", heads_GKD[0])):
        made = open_source(folder / "seed-2" / "weights" / f"1-{method}")
        torch.testing.assert_close(made.weights.read(name), expected)


@pytest.mark.launch
def test_heads_are_grouped_step_by_step_over_as_many_tokens(done, command):
    folder, found, _ = done
    chain = chain_of(plan(command), 1, 1)
    assert [(run.kv_heads, run.steps, run.level) for run in chain] == [(2, (3,), 1), (1, (3,), 2)]
    between = open_source(folder / "seed-1/uptrained/2-mean-0.3-step1of2")
    made = open_source(folder / "seed-1/weights/2-mean-0.3-step1of2-1").weights
    name = "blocks.0.attention.qkv.v_proj.weight"
    assert between.run.tokens == 3 * 256
    torch.testing.assert_close(made.read(name), between.weights.read(name).unflatten(0, (2, -1)).mean(0))
    curve = {r["step"]: r for r in runs.metrics(folder / "seed-1/uptrained/1-mean-0.3-step2of2")}
    assert list(curve) == [0, 1, 2, 3]
    (mqa,) = found["sections"]["warm_starts"]["models"]
    assert mqa["ways"]["step by step"]["val_loss"]["values"][0] == curve[3]["val_loss"]
    # 20 steps of the pretraining, 3 of the first step: the data goes on behind them
    settings = json.loads((folder / "seed-1/uptrained/1-mean-0.3-step2of2/started.json").read_text())
    assert settings is not None
    assert open_source(folder / "seed-1/uptrained/1-mean-0.3-step2of2").run.config["train"]["skip_samples"] == 23 * 8


@pytest.mark.launch
def test_windows_and_the_smaller_model_are_what_is_trained(done):
    folder, found, _ = done
    shape = open_source(folder / "seed-2/uptrained/1-mean-0.3-w8").weights.config
    assert (shape.window, shape.window_pattern, shape.n_kv_heads) == (8, None, 1)
    models = found["sections"]["windows"]["models"]
    assert [(model["kv_heads"], model["window"]) for model in models] == [(4, None), (4, 8), (1, None), (1, 8)]
    assert [model["cache_bytes"] // (2 * 8 * 4 * 4) for model in models] == [4 * 32, 4 * 8, 32, 8]
    assert all(model["val_loss"]["n"] == 2 for model in models)
    smaller = open_source(folder / "seed-1/smaller-1layers/uptrained/4-original-0.3").weights.config
    assert (smaller.n_layers, smaller.n_kv_heads) == (1, 4)  # with the cache of MQA of 4 layers
    assert found["sections"]["smaller"]["against"][0]["cache"] == 1.0


@pytest.mark.launch
def test_costs_are_those_of_the_shapes(done):
    _, found, _ = done
    many, one, small = found["sections"]["decode"]["models"]
    assert many["kv_cache_bytes_per_token"] == 4 * one["kv_cache_bytes_per_token"] == 4 * 2 * 4 * 8 * 4
    assert many["parameters"] - one["parameters"] == 4 * 2 * 3 * 8 * 32
    assert small["layers"] == 1
    for model in (many, one, small):
        grid = [(time["batch"], time["context"]) for time in model["decode"]]
        assert grid == [(1, 8), (1, 16), (2, 8), (2, 16)]
        assert all(time["seconds"] > 0 for time in model["decode"])


@pytest.mark.launch
def test_what_heads_hold_and_recall_is_measured_of_each_seed_after_as_many_steps(done):
    folder, found, _ = done
    heads = found["sections"]["heads"]["by_seed"]
    names = ["MHA", "MQA, converted", "MQA, uptrained"]
    assert [[model["name"] for model in one["models"]] for one in heads] == [names, names]
    assert heads[0]["models"][0]["mean"]["patterns"] != heads[1]["models"][0]["mean"]["patterns"]
    # with the first seed training went on, and its weights at study.alpha were kept
    kept = [path.name for path in (folder / "seed-1/uptrained/1-mean-0.5/checkpoints").glob("step-*")]
    assert "step-00000006" in kept
    assert [model["name"] for model in found["sections"]["long_range"]["by_seed"][1]["models"]] == ["MHA", "MQA"]


@pytest.mark.launch
def test_pictures_and_tables_are_kept_and_logged(done, command):
    folder, _, _ = done
    pictures = ["loss", "tradeoff", "smaller", "heads", "head-similarity", "loss-by-position", "long-range", "windows"]
    for name in [*pictures, "warm-starts"]:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    asked = "study.sections=[uptraining,windows,warm_starts]"
    assert study.run([*command, "wandb.mode=offline", asked], StandIn(lambda run_dir, step: None)) == 0
    logged = logged_keys(folder)
    assert {"loss", "windows", "warm-starts", "val_loss", "orderings", "windows_loss", "warm_starts"} <= logged, logged


@pytest.mark.launch
def test_orderings_over_seeds_are_those_of_known_losses_and_a_section_that_fails_keeps_the_others(
    done, tmp_path, capsys
):
    """The original is given, and losses are written in the place of trainings; those with a window fail."""
    folder, _, _ = done
    by_heads = {"4-original": 3.0, "2-mean": 3.1, "2-first": 3.2, "1-mean": 3.3, "1-first": 3.4}

    def loss(run_dir, step):
        if "-w" in run_dir.name:
            return None
        base = by_heads["-".join(run_dir.name.split("-")[:2])] + (0.5 if step == 0 else 0.0)
        swapped = run_dir.parts[-3] == "seed-2" and run_dir.name.startswith("1-mean") and step
        return base + (0.15 if swapped else 0.0)  # with the second seed the first head is better

    starts = StandIn(loss)
    more = [f'init_from="{folder / "seed-1" / "pretrained"}"', "study.methods=[mean,first]", "study.alphas=[0.3]"]
    more += ["study.alpha=0.3", "study.windows=[8]", f"study.dir={tmp_path / 'other'}", "wandb.mode=disabled"]
    asked = [*more, "study.sections=[uptraining,windows]"]
    assert study.run(asked, starts) == 1
    found = json.loads((tmp_path / "other" / "study.json").read_text())["sections"]
    assert found["windows"] == {"failed": "a training ended with exit code 1"}
    text = capsys.readouterr().out
    assert "windows: Sliding windows together with grouping\n-" in text and "failed: a training ended" in text
    converted, uptrained, *_ = found["uptraining"]["orderings"]
    assert (converted["held"], converted["held_for"]) == (True, {"GQA-2": 3, "MQA": 3})
    assert (uptrained["held"], uptrained["held_for"]) == (False, {"GQA-2": 3, "MQA": 2})
    assert "reproduced with each of 3 seeds: mean better than first better than random, right after conv" in text
    assert "reproduced with each of 3 seeds for GQA-2 only: mean better than first better than random, after" in text
    assert "MQA after alpha = 0.3 against MHA trained on as long: loss higher by 0.3500 ± 0.0866" in text
    assert "of the uptrainings' order of data; the original is one" in text
    # the weights of one original are the same for all seeds
    assert {path.name for path in (tmp_path / "other" / "weights").iterdir()} == {
        "2-mean",
        "2-first",
        "1-mean",
        "1-first",
    }
    seeds = [plan(asked).training(plan(asked).uptraining(Original(seed), 2, Method.mean), Path()) for seed in (1, 2, 3)]
    of_order = [[text for text in one.overrides if text.startswith("train.seed")] for one in seeds]
    assert of_order == [[], ["train.seed=2"], ["train.seed=3"]]
    many = [
        "++train.seq_len=16",
        "+data=files",
        "optimizer.lr=0.1",
        "schedule=wsd",
        "sample.tokens=3",
        "train.val_at=[1]",
    ]
    with pytest.raises(BadInput) as error:
        plan([*asked, *many])
    keys = ["train.seq_len", "data", "optimizer.lr", "schedule", "sample.tokens", "train.val_at"]
    assert [problem.partition(":")[0] for problem in error.value.problems] == keys
    assert error.value.problems[0] == "train.seq_len: is the original's; leaving it out would work"
    for other, word in (("seed-2", "init_from"), ("seed-1", "study.seeds[0]")):
        changed = [f'init_from="{folder / other / "pretrained"}"', "study.seeds=[2,3]"]
        with pytest.raises(BadInput, match=r"holds runs of another recipe \(" + re.escape(word)):
            plan([*asked, *changed[: 1 if word == "init_from" else 2]])
    before = len(starts.folders)
    assert study.run([*more, "study.sections=[uptraining]"], starts) == 0
    assert len(starts.folders) == before


@pytest.mark.launch
def test_a_measurement_that_fails_names_itself_and_keeps_the_others(done, command, capsys):
    from dataclasses import replace

    def broken(results, found):
        raise RuntimeError("no memory is left")

    parts = {**PARTS, Section.heads: replace(PARTS[Section.heads], findings=broken)}
    folder, _, _ = done
    assert study.run([*command, "study.sections=[uptraining,heads]"], None, parts) == 1
    found = json.loads((folder / "study.json").read_text())["sections"]
    assert found["heads"] == {"failed": "RuntimeError: no memory is left"} and found["uptraining"]["models"]
    said = capsys.readouterr()
    assert "heads: RuntimeError: no memory is left; the other sections go on" in said.err
    assert "failed: RuntimeError: no memory is left" in said.out


@pytest.mark.launch
def test_a_study_of_trained_weights_is_kept_under_their_name_and_has_no_smaller_model(done):
    folder, _, _ = done
    given = folder / "seed-1" / "pretrained"
    found = plan([f'init_from="{given}"', *SMALL])
    assert found.folder == Path("runs/gqa-pretrained") and Section.smaller not in found.sections
    assert plan([f'init_from="{folder / "seed-1" / "weights" / "1-mean"}"', *SMALL]).folder == Path("runs/gqa-1-mean")
    with pytest.raises(BadInput, match="smaller pretrains a smaller model by the recipe of the original"):
        plan([f'init_from="{given}"', *SMALL, "study.sections=[smaller]"])
