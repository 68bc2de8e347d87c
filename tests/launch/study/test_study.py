"""The study of grouped-query attention: its plan, a small one from command to report, and sections that fail."""

import json
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from launch.study import run as study
from launch.study.findings import PARTS
from launch.study.plan import Original, plan
from launch.study.settings import Section, Window
from launch.study.training import KeptStarts, calibration_rows
from launch.study.warm_starts import chain_of
from launch.trainings.starts import ForkStarter
from model.problems import BadInput
from model.regroup import Method
from tests.ranks import nursery
from tests.train.checkpoint import runs
from train.pretrained import open_source
from train.strict_json import dumps
from train.wandb_file import records

MULTI_HEAD = ["model.n_kv_heads=4", "train.total_tokens=5120", "schedule.warmup_steps=2", "train.val_sequences=4"]
SMALL = ["study.methods=[mean,first]", "study.alphas=[0.3,0.5]", "study.alpha=0.3", "study.kv_heads=[1]"]
QUICK = ["study.batches=[1,2]", "study.contexts=[8,16]", "study.windows=[8]", "study.warm_starts=[similar,aligned]"]
TRAINED = "sections=[uptraining,decode,smaller,heads,long_range,windows,warm_starts]"


class Starts:
    """Starts trainings, two at a time, forked from the session's process; which run folders it was asked for."""

    slots = 2

    def __init__(self):
        self.folders, self._starter = [], object.__new__(ForkStarter)
        self._starter._forks = nursery()._forks

    @contextmanager
    def __call__(self, ranks, at_once):
        yield self

    def start(self, prepared, slot):
        self.folders.append("/".join(prepared.run_dir.parts[-3:]))
        return self._starter.start(prepared, slot)


class Ended:
    """A training that has ended."""

    def __init__(self, code):
        self.code = code

    def poll(self):
        return self.code

    def signal(self, number):
        return False

    def kill(self):
        raise AssertionError


class StandIn:
    """Writes the losses that a function gives for a run's folder and a step; those of which it gives none fail."""

    slots = 2

    def __init__(self, loss):
        self.loss, self.folders = loss, []

    @contextmanager
    def __call__(self, ranks, at_once):
        yield self

    def start(self, prepared, slot):
        run_dir, steps = prepared.run_dir, [0, *prepared.config.train.val_at]
        self.folders.append(run_dir.name)
        losses = [self.loss(run_dir, step) for step in steps]
        if None in losses:
            return Ended(1)
        run_dir.mkdir(parents=True, exist_ok=True)
        lines = [dumps({"step": step, "val_loss": loss}) for step, loss in zip(steps, losses, strict=True)]
        (run_dir / "metrics.jsonl").write_text("\n".join(lines))
        (run_dir / "summary.json").write_text('{"complete": true, "diverged": false}')
        return Ended(0)


@pytest.fixture(scope="module")
def command(overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "it's kept"
    quiet = "wandb.mode=disabled"  # W&B takes most of the seconds of runs as short as these
    return [
        *overrides,
        *MULTI_HEAD,
        *SMALL,
        *QUICK,
        f"study.{TRAINED}",
        "study.seeds=[1,2]",
        quiet,
        f"study.dir={folder}",
    ]


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
        f"{above}/pretrained" for above in ("it's kept/seed-1", "it's kept/seed-2", "seed-1/smaller", "seed-2/smaller")
    )
    smaller = {"smaller/uptrained/4-original-0.3" for _ in range(2)}
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
    smaller = open_source(folder / "seed-1/smaller/uptrained/4-original-0.3").weights.config
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
    (first, *_) = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    history = [r.history for r in records(first) if r.WhichOneof("record_type") == "history"]
    logged = {(item.key or item.nested_key[0]) for line in history for item in line.item}
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


def test_a_schedule_that_runs_again_is_a_run_for_each_share(command, tmp_path):
    held, again = plan(command), plan([*command, "uptrain.rate=again", f"study.dir={tmp_path}"])
    first, second = Original(1), Original(2)
    assert [run.steps for run in held.compared(first, 1)] == [(6, 10)]
    assert [run.steps for run in held.compared(second, 1)] == [(6,)]
    assert [run.steps for run in again.compared(first, 1)] == [(6,), (10,)]
    shared = again.training(again.compared(first, 1)[0], Path("weights")).overrides
    assert "uptrain.rate=again" in shared and any(text.startswith("data.cache_dir=") for text in shared)
    assert not any(text.startswith(("model.n_", "optimizer.", "train.total_tokens")) for text in shared)
    assert "checkpoint.keep_every=6" in held.training(held.compared(first, 1)[0], Path()).overrides
    assert "checkpoint.keep_every=6" not in shared


def test_null_is_every_divisor_and_windows_are_parts_of_the_context(overrides, tmp_path):
    more = [f"study.dir={tmp_path / 'all'}", "study.alphas=[0.05,0.3]"]
    found = plan([*overrides, *MULTI_HEAD, *more])
    assert found.kv_heads == [4, 2, 1] == found.few
    assert found.sections == list(Section)
    assert found.windows == [Window(16), Window(8), Window(8, "ssf")]
    assert found.smaller_model.n_layers == 2  # the cache of GQA-2
    rows_BL = calibration_rows(found)
    assert (
        rows_BL.shape == (8, 32) and rows_BL.dtype == torch.int64 and len({tuple(row) for row in rows_BL.tolist()}) == 8
    )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["study.kv_heads=[3]"], "study.kv_heads=3: does not divide the 4 key/value heads"),
        (["study.methods=[median]"], "study.methods=[median]: "),
        (["study.methods=[similar]"], "study.methods=[similar]: is compared elsewhere; mean, first, random would work"),
        (
            ["study.warm_starts=[first]"],
            "study.warm_starts=[first]: is compared elsewhere; similar, aligned, svd would",
        ),
        (["study.alpha=0.2"], "study.alpha=0.2: not one of study.alphas=[0.3, 0.5]"),
        (["study.alphas=[0.26,0.3]"], "0.26 and 0.3 are both 6 steps of training"),
        (["study.alphas=[0.0,0.3]"], "at least one share above 0"),
        (["study.batches=[]"], "study.batches=[]: at least one number"),
        (["study.contexts=[0]"], "study.contexts=[0]: at least one number, each at least 1"),
        (["study.sections=[heads,attention]"], "study.sections=[heads,attention]: "),
        (["study.sections=[]"], "study.sections=[]: at least one of uptraining, decode"),
        (["study.seeds=[]"], "study.seeds=[]: at least one number"),
        (["study.seeds=[1,2,1]"], "study.seeds: 1 stands there twice"),
        (["study.windows=[wide]"], "study.windows=[wide]: is no number of tokens; [16] or"),
        (["study.windows=[32]"], "study.windows=[32]: hides nothing in train.seq_len=32 tokens"),
        (['study.windows=["8:fff"]'], "study.windows=[8:fff]: model.window_pattern=fff: has no s"),
        (["study.smaller_layers=4"], "study.smaller_layers=4: must be 1 to 3"),
        (["study.parallel_runs=0"], "study.parallel_runs=0: must be at least 1"),
        (["study.device=h1000", "study.sections=[roofline]"], "study.device=h1000: no such preset"),
        (["study.heads=2"], "study.heads=2: no such key; there are study.sections, study.seeds"),
        (["train.seed=2"], "train.seed: is the study's to set; study.seeds=[…] would work"),
        (["hydra.run.dir=/elsewhere"], "hydra.run.dir: is the study's to set; study.dir="),
        (["uptrain.alpha=0.1"], "uptrain.alpha: is the study's to set"),
        (["model.n_heads=5"], "model.n_kv_heads=4: does not divide model.n_heads=5"),
        (["parallel.pp=99"], "parallel.pp=99: more stages than the 4 layers"),
        (["data.val_fraction=0"], "data.val_fraction=0: a study measures the loss on held-out documents"),
        (["checkpoint.enabled=false"], "checkpoint.enabled=false: a study reads the weights of its runs"),
        (["train.val_sequences=1"], "train.val_sequences=1: a passage of one held-out sequence is read in another"),
        (["init_from=/nowhere"], "/nowhere: no weights are there"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(wrong, said, command, tmp_path):
    starts = StandIn(lambda run_dir, step: None)
    with pytest.raises(BadInput) as error:
        study.run([*command, f"study.dir={tmp_path / 'none'}", *wrong], starts)
    assert any(said in problem for problem in error.value.problems), error.value.problems
    assert starts.folders == [] and not (tmp_path / "none" / "seed-1" / "weights").exists()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("train.global_batch=16", "(train.global_batch=8 there, 16 here"),
        ("model.window=16", "(model.window=None there, 16 here"),
        ("train.val_sequences=8", "(train.val_sequences=4 there, 8 here"),
        ("uptrain.rate=again", "(uptrain.rate=end there, again here"),
        ("study.alphas=[0.3,0.5,0.7]", "(study.alphas=[0.3, 0.5] there, [0.3, 0.5, 0.7] here"),
        ("study.alpha=0.5", "(study.alpha=0.3 there, 0.5 here"),
    ],
)
def test_a_folder_is_of_one_recipe_and_of_the_shares_that_its_runs_measure(other, said, command, tmp_path):
    here = [*command, f"study.dir={tmp_path}"]
    plan(here).keep_recipe()
    more = ["study.seeds=[1,2,3]", "study.kv_heads=[2,1]", "study.sections=[heads]", "study.alphas=[0.5,0.3]"]
    assert plan([*here, *more]).kv_heads == [4, 2, 1]
    with pytest.raises(BadInput) as error:
        plan([*here, other])
    (problem,) = error.value.problems
    assert problem.startswith(f"study.dir={tmp_path}: holds runs of another recipe {said}"), problem


def test_the_recipe_is_kept_before_anything_is_trained(command, tmp_path):
    here = [*command, f"study.dir={tmp_path}", "study.seeds=[1]", "study.sections=[decode]"]
    assert study.run(here, StandIn(lambda run_dir, step: None)) == 1
    assert json.loads((tmp_path / "recipe.json").read_text()) == plan(here).recipe


def test_several_mistakes_are_said_together(command, tmp_path):
    with pytest.raises(BadInput) as error:
        plan([*command, f"study.dir={tmp_path}", "study.heads=2", "train.global_batch=0"])
    assert [problem.partition("=")[0] for problem in error.value.problems] == ["study.heads", "train.global_batch"]


def test_what_starts_trainings_is_kept_from_one_call_to_the_next(monkeypatch):
    made, closed = [], []

    @contextmanager
    def starter(ranks, at_once):
        made.append((ranks, at_once))
        yield made[-1]
        closed.append((ranks, at_once))

    monkeypatch.setattr("launch.study.training.starter", starter)
    kept = KeptStarts()
    for ranks in (1, 1, 2):
        with kept(ranks, None) as found:
            assert found == (ranks, None)
    assert made == [(1, None), (2, None)] and closed == [(1, None)]
    kept.close()
    assert closed == made
