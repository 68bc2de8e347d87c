"""Spikes and gradients that are not finite, planted in one rank of whole runs: all ranks skip the same updates."""

import json
import shutil
from functools import cache

import pytest

from conf.validate import Machine
from model.problems import BadInput
from tests.faults.test_learned import run, summary
from tests.train.checkpoint import runs
from train.preflight import preflight
from train.spikes import SKIPPED

STEPS, SPIKE, NAN, LEAST = 14, 9, 11, 6
ASKED = [f"train.max_steps={STEPS}", "train.spike_sigmas=6", "schedule.warmup_steps=4"]
ANYWHERE = Machine(gpus=0, elsewhere=True)
LAYOUTS = {"dp2": ["parallel.dp=2"], "pp2": ["parallel.pp=2"], "tp2": ["parallel.tp=2"]}


def planted(before=0):
    """The fault of a run that goes on after so many steps."""
    return ["spike_and_nan", str(SPIKE - before), str(NAN - before), "1", str(LEAST)]


@pytest.fixture(scope="module")
def spoilt(overrides, tmp_path_factory):
    """From a layout to the folder of a run with the spike and the NaN on its second rank, and what it said."""

    @cache
    def of_layout(name):
        folder = tmp_path_factory.mktemp(name)
        return folder, run(folder, planted(), *overrides, *ASKED, *LAYOUTS[name], num=2)

    return of_layout


def listed(folder):
    return [json.loads(line) for line in (folder / SKIPPED).read_text().splitlines()]


@pytest.mark.launch
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_skips_the_same_updates_and_names_their_samples(layout, spoilt):
    folder, said = spoilt(layout)
    records = {record["step"]: record for record in runs.metrics(folder)}
    reasons = {step: record["skipped"] for step, record in records.items() if "skipped" in record}
    assert reasons == {SPIKE: "grad_norm", NAN: "not finite"} and summary(folder)["skipped_steps"] == 2
    assert records[SPIKE]["grad_norm"] > records[SPIKE]["grad_norm_limit"] > records[SPIKE - 1]["grad_norm"]
    assert f"step {SPIKE} was skipped: its gradient norm of " in said and "samples 64 to 71 of the order" in said
    for found, step in zip(listed(folder), (SPIKE, NAN), strict=True):
        first = 8 * (step - 1)
        assert found["step"] == step and found["samples"] == [[first, first + 7]]
        assert found["places"] == {"files": [[first, first + 7]]} and len(set(found["sequences"]["files"])) == 8
    assert [one["sequences"] for one in listed(folder)] == [one["sequences"] for one in listed(spoilt("dp2")[0])]
    for step, values in runs.curve(folder).items():
        assert values["loss"] == pytest.approx(runs.curve(spoilt("dp2")[0])[step]["loss"], rel=1e-5)


@pytest.mark.launch
def test_a_resumed_run_judges_spikes_as_the_uninterrupted_one(spoilt, overrides, tmp_path):
    folder, _ = spoilt("dp2")
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    back = runs.saved(tmp_path, 6)  # the window of this run alone would be too short to judge the spike by
    run(tmp_path, planted(6), *overrides, *ASKED, *LAYOUTS["dp2"], f"resume={back}", num=2)
    assert runs.digests(runs.saved(tmp_path, STEPS)) == runs.digests(runs.saved(folder, STEPS))
    assert listed(tmp_path) == listed(folder)
    assert (tmp_path / "earlier" / "1" / SKIPPED).read_bytes() == (folder / SKIPPED).read_bytes()


@pytest.mark.launch
def test_steps_that_are_passed_over_leave_the_weights_that_skipped_updates_leave(spoilt, overrides, tmp_path):
    folder, _ = spoilt("dp2")
    passed = f"train.skip_steps=[{SPIKE},{NAN}]"
    said = run(tmp_path, [], *overrides, *ASKED, *LAYOUTS["dp2"], passed, num=2)
    assert f"step {SPIKE} is passed over (train.skip_steps), and with it samples 64 to 71" in said
    assert runs.digests(runs.saved(tmp_path, STEPS)) == runs.digests(runs.saved(folder, STEPS))
    records = {record["step"]: record for record in runs.metrics(tmp_path)}
    assert list(records) == list(range(1, STEPS + 1))
    assert [step for step, record in records.items() if record.get("passed_over")] == [SPIKE, NAN]
    assert records[SPIKE + 1]["loss"] == runs.curve(folder)[SPIKE + 1]["loss"]


@pytest.mark.launch
def test_samples_are_passed_over_from_an_earlier_checkpoint_alone(spoilt, overrides, tmp_path):
    folder, _ = spoilt("dp2")
    shutil.copytree(folder, tmp_path, symlinks=True, dirs_exist_ok=True)
    bad = ["train.skip_samples_at=[64-71]", "train.max_steps=10"]
    with pytest.raises(BadInput) as refused:
        preflight([*overrides, *ASKED[1:], *bad, "wandb.mode=disabled", f"hydra.run.dir={tmp_path}"], machine=ANYWHERE)
    (problem,) = refused.value.problems
    assert problem.startswith("train.skip_samples_at=[64-71]: the checkpoint of step 14 has trained on samples 64-71; ")
    assert f"resume={runs.saved(tmp_path, 8)} goes back before that" in problem
    said = run(tmp_path, [], *overrides, *ASKED[1:], *LAYOUTS["dp2"], *bad, f"resume={runs.saved(tmp_path, 8)}", num=2)
    assert "samples 64 to 71 are passed over: 8 of files, 64 to 71 of its order" in said
    # The next batch comes a step earlier, to the same weights: the update of the ninth step was skipped.
    assert runs.curve(tmp_path)[9]["loss"] == runs.curve(folder)[10]["loss"]
    again = preflight([*overrides, *ASKED[1:], *bad[:1], f"hydra.run.dir={tmp_path}"], machine=ANYWHERE)
    assert not again.complete and again.start.own
