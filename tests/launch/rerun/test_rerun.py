"""Steps of a real run computed again, on sound devices and on one that flips a bit."""

import argparse
import json
import shutil

import pytest

from launch.rerun import run as rerun
from model.problems import BadInput
from tests.ranks import nursery
from tests.train.checkpoint import runs

STAGES = ["parallel.pp=2", "train.max_steps=4", "schedule.warmup_steps=2", "checkpoint.every_steps=2"]


@pytest.fixture(scope="module")
def trained(overrides, tmp_path_factory):
    """A run of four steps on two stages, saved after the second."""
    folder = tmp_path_factory.mktemp("run")
    runs.finish(folder, 2, *overrides, *STAGES)
    return folder


def asked(folder, step, repeats=1, placements=1, **more):
    return argparse.Namespace(source=str(folder), step=step, repeats=repeats, placements=placements, json=False, **more)


def forked(**fault):
    """Start ranks from the nursery."""

    def start(folder, size, environment):
        place = {key: value for key, value in environment.items() if key not in ("WORLD_SIZE", "LOCAL_SIZE")}
        return nursery().start("tests.launch.rerun.faulty_rank", size, [str(folder)], folder, **place, **fault).wait(90)

    return start


@pytest.mark.launch
def test_sound_devices_agree_with_each_other_and_with_the_record(trained, capsys):
    assert rerun.run(asked(trained, 4, repeats=2, placements=2), forked()) == 0
    said = capsys.readouterr().out
    record = runs.metrics(trained)[3]
    assert f"recorded                loss {record['loss']!r}  norm {record['grad_norm']!r}" in said
    assert said.count("computed again") == 1 and f"loss {record['loss']!r}" in said.split("computed again")[1]
    assert "steps 3 to 3 before it: as recorded" in said
    assert "all 8 attempts agree to the last bit, on 3 devices, and with what the run has recorded" in said
    assert "data or optimisation are at fault" in said and "train.skip_samples_at=[24-31] passes over it" in said
    assert f"resume={runs.saved(trained, 2)} with train.skip_steps=[4]" in said


@pytest.mark.launch
def test_a_device_that_always_flips_a_bit_is_named(trained, capsys):
    assert rerun.run(asked(trained, 3, placements=3), forked(RERUN_FAULT="process 1, always")) == 1
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("hardware is at fault: ")]
    assert line.startswith("hardware is at fault: process 1 of ") and "computes otherwise than all others" in line
    assert "(the part of rank 0, from layer 1 in F stage 0 micro-batch 0 on" in line  # layer 0 is the embedding
    assert said.count("computed again") == 3  # as the last placement, without that process, and wrongly in two ways


@pytest.mark.launch
def test_a_device_that_flips_a_bit_once_is_named_and_where_it_began(trained, capsys):
    assert rerun.run(asked(trained, 3, repeats=3), forked(RERUN_FAULT="process 0, attempt 2")) == 1
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("hardware is at fault: ")]
    assert line.startswith("hardware is at fault: process 0 of ") and "computes not alike each time" in line
    assert line.endswith("(the part of rank 0, from layer 1 in F stage 0 micro-batch 0 on)")


@pytest.mark.launch
def test_a_record_that_no_device_gives_again_is_of_hardware_as_well(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path, symlinks=True, dirs_exist_ok=True)
    records = runs.metrics(tmp_path)
    records[2]["loss"] += 0.5
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert rerun.run(asked(tmp_path, 4), forked()) == 0
    assert "steps 3 to 3 before it: other than recorded from step 3 on" in capsys.readouterr().out
    assert rerun.run(asked(tmp_path, 3), forked()) == 1
    assert "some device has computed wrongly then, and did not now" in capsys.readouterr().out


def test_placements_that_differ_before_the_step_move_it_there(trained, monkeypatch, capsys):
    steps = []

    def computed(request, folder, start):
        steps.append((request.step, request.start))
        first, other = ((3, 1.0, 1.0), (3, 1.5, 1.0)) if request.step == 4 else ((), ())
        replays = [[first], [other]] if first else [[], []]
        return rerun.Found(replays, [rerun.Attempt(0, "process 0", 1.0, 1.0, {"layer 0": 1})], [0, 7])

    monkeypatch.setattr(rerun, "computed", computed)
    rerun.run(asked(trained, 4))
    assert steps == [(4, runs.saved(trained, 2)), (3, runs.saved(trained, 2))]
    assert "the placements differ at step 3 already, which is taken instead" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": 0, "repeats": 0}, ["--step=0: must be at least 1", "--repeats=0: must be at least 1"]),
        ({"step": 10**6}, ["--step=1000000: the run ends with step "]),
        ({"source": "/nowhere"}, ["--like=/nowhere: no run is there"]),
    ],
)
def test_what_cannot_be_computed_again_is_said(changes, said, trained, tmp_path):
    with pytest.raises(BadInput) as error:
        rerun.request_of(argparse.Namespace(**{**vars(asked(trained, 4)), **changes}), tmp_path)
    assert [problem.startswith(text) for problem, text in zip(error.value.problems, said, strict=True)] == [True] * len(
        said
    )


def test_the_steps_begin_at_the_newest_checkpoint_before(trained, tmp_path):
    starts = {step: rerun.request_of(asked(trained, step), tmp_path).start for step in (2, 3, 4, 5)}
    assert starts == {2: None, 3: runs.saved(trained, 2), 4: runs.saved(trained, 2), 5: runs.saved(trained, 4)}


@pytest.mark.launch
def test_a_run_that_began_elsewhere_is_not_computed_from_new_weights(trained, overrides, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "step-00000002"
    shutil.copytree(runs.saved(trained, 2), elsewhere)
    later = tmp_path / "later"
    runs.finish(later, 2, *overrides, *STAGES, f"resume={elsewhere}", "checkpoint.every_steps=4")
    assert rerun.request_of(asked(later, 4), tmp_path / "scratch").start == elsewhere
    shutil.rmtree(elsewhere.parent)
    with pytest.raises(BadInput, match=r"began with step 3 from .*, which is not there"):
        rerun.request_of(asked(later, 4), tmp_path / "scratch")


def test_only_gpus_that_are_there_are_named(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert rerun._devices() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert rerun._devices() == ["3", "5"]
