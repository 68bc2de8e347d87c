"""The plan of a study of grouped-query attention: what it trains, and what it refuses before anything is trained."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch.study import run as study
from launch.study.plan import Original, plan
from launch.study.settings import Section, Window
from launch.study.training import calibration_rows
from model.problems import BadInput
from tests.launch.study.small import MULTI_HEAD, StandIn, small_study
from train.pretrained import Source


@pytest.fixture(scope="module")
def command(overrides, tmp_path_factory):
    return small_study(overrides, tmp_path_factory.mktemp("study") / "it's kept")


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
        (["++checkpoint.every_steps=7"], "checkpoint.every_steps: is the study's to set; it saves where it looks"),
        (["checkpoint.keep_every=7"], "checkpoint.keep_every: is the study's to set; it keeps what it looks at"),
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


def test_given_weights_bring_their_recipe_and_what_would_reach_no_uptraining_is_refused(command, tmp_path, monkeypatch):
    """The weights stand for those of a run, which plans need no file of."""
    model = plan(command).model
    source = Source(tmp_path / "weights", SimpleNamespace(config=model), None, None)
    monkeypatch.setattr("launch.study.plan.open_source", lambda path, key: source)
    refused = [
        "++train.seq_len=16",
        "+data=files",
        "optimizer.lr=0.1",
        "schedule=wsd",
        "model.d_ff=8",
        "sample.tokens=3",
    ]
    taken = ["+train.micro_batch=2", "++data.cache_dir=here", "data.path=there", "launch.restarts=1", "cluster=h100"]
    taken += ["train.val_sequences=4", "wandb.mode=disabled", "model.kernels=torch", "uptrain.rate=again"]
    with pytest.raises(BadInput) as error:
        plan(["init_from=weights", f"study.dir={tmp_path}", *refused, *taken])
    assert error.value.problems == [
        *(f"{key}: is the original's; leaving it out would work"
          for key in ("train.seq_len", "data", "optimizer.lr", "schedule", "model.d_ff")),
        "sample.tokens: reaches no uptraining; leaving it out would work",
    ]  # fmt: skip


def test_what_is_no_part_of_the_recipe_applies_to_every_run_however_it_is_written(command, tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [config]\n")
    more = ["++train.micro_batch=2", "++checkpoint.every_minutes=9", "--config-dir", str(tmp_path), "model.window=8"]
    shared = plan([*command, f"study.dir={tmp_path / 'other'}", *more]).shared
    assert {"++train.micro_batch=2", "++checkpoint.every_minutes=9", f"--config-dir={tmp_path}"} <= set(shared)
    assert not any("window" in text or text in ("--config-dir", str(tmp_path)) for text in shared)


def test_smaller_models_of_other_layers_have_folders_of_their_own(command):
    for more, layers in ((["study.kv_heads=[1]"], 1), (["study.kv_heads=[2]"], 2), (["study.smaller_layers=3"], 3)):
        found = plan([*command, *more])
        original = Original(1, smaller=True)
        above = found.folder / "seed-1" / f"smaller-{layers}layers"
        assert found.pretraining(original).run_dir == above / "pretrained"
        assert f"model.n_layers={layers}" in found.pretraining(original).overrides
        assert found.run_dir(found.compared(original, 4)[0]).parent == above / "uptrained"


def test_the_recipe_is_kept_before_anything_is_trained(command, tmp_path):
    here = [*command, f"study.dir={tmp_path}", "study.seeds=[1]", "study.sections=[decode]"]
    assert study.run(here, StandIn(lambda run_dir, step: None)) == 1
    assert json.loads((tmp_path / "recipe.json").read_text()) == plan(here).recipe


def test_several_mistakes_are_said_together(command, tmp_path):
    with pytest.raises(BadInput) as error:
        plan([*command, f"study.dir={tmp_path}", "study.heads=2", "train.global_batch=0"])
    assert [problem.partition("=")[0] for problem in error.value.problems] == ["study.heads", "train.global_batch"]
