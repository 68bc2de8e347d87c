"""Checkpoints that are not what they say, disks that take no more."""

import json
import shutil
import time

import pytest

from parallel.heartbeat import FOLDER, failure_of
from tests.train.checkpoint import runs
from tests.train.checkpoint.runs import STEPS
from train.checkpoint import manifest

BUSY = "is not saved: the save before is still being written"
FILES = ["manifest.json", "tokenizer.json", "rank00000.safetensors", "rank00001.safetensors"]


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {"cut short": cut_short, "a flipped bit": flip_a_bit, "missing": lambda path: path.unlink()}


@pytest.fixture
def copy(undisturbed, tmp_path):
    """An undisturbed run, to be disturbed."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder, symlinks=True)
    (folder / "summary.json").unlink()
    return folder


@pytest.mark.launch
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_every_damage_to_every_file_is_found(file, damage, copy):
    newest = runs.saved(copy, STEPS)
    manifest.check_files(newest, manifest.read(newest))
    DAMAGES[damage](newest / file)
    with pytest.raises(manifest.Damaged, match=file):
        manifest.check_files(newest, manifest.read(newest))


@pytest.mark.launch
@pytest.mark.parametrize(("file", "damage"), zip(FILES, [*DAMAGES, "cut short"], strict=True))
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_goes_on(file, damage, copy, undisturbed, overrides):
    newest = runs.saved(copy, STEPS)
    DAMAGES[damage](newest / file)
    (copy / "checkpoints" / "step-00000003.tmp").mkdir()  # of a process that died; this run saves no step 3
    said = runs.finish(copy, 2, *overrides, "parallel.pp=2")
    assert said.count(f"{newest} is damaged ({file}") == 1 and said.count("going on after step 10") == 1
    assert newest.with_name(newest.name + ".damaged").is_dir()
    assert not list((copy / "checkpoints").glob("*.tmp"))
    assert runs.digests(newest) == runs.digests(runs.saved(undisturbed, STEPS))
    assert runs.curve(copy) == runs.curve(undisturbed)


@pytest.mark.launch
def test_where_none_is_sound_nothing_is_begun_again(copy, overrides):
    before = runs.metrics(copy)
    for step in range(2, STEPS + 1, 2):
        flip_a_bit(runs.saved(copy, step) / "rank00001.safetensors")
    ranks = runs.start(copy, 2, *overrides, "parallel.pp=2")
    assert 2 in ranks.wait(60)
    said = (copy / "rank0.log").read_text()
    assert "no sound checkpoint in" in said and "resume=never would start" in said and "Traceback" not in said
    assert runs.metrics(copy) == before


@pytest.mark.launch
def test_one_that_was_asked_for_by_name_stays_where_it_is(undisturbed, overrides, tmp_path):
    named = tmp_path / "elsewhere" / "step-00000010"
    shutil.copytree(runs.saved(undisturbed, 10), named)
    flip_a_bit(named / "rank00000.safetensors")
    ranks = runs.start(tmp_path / "run", 2, *overrides, "parallel.pp=2", f"resume={named}")
    assert 2 in ranks.wait(60) and named.is_dir()
    assert f"resume={named}: no sound checkpoint" in (tmp_path / "run" / "rank0.log").read_text()


def hindered(folder, how, *overrides):
    return runs.start(folder, 2, *overrides, "parallel.pp=2", module="tests.train.checkpoint.hindered", before=how)


def failed_or_left_out(said, failure, saves):
    """Whether so many saves were due, of which each has failed or came while the one before was still being tried."""
    failed, left_out = said.count(failure), said.count(BUSY)
    return failed >= 2 and failed + left_out == saves


@pytest.mark.launch
def test_a_full_disk_costs_no_step_and_no_checkpoint(overrides, undisturbed, tmp_path):
    runs.finish(tmp_path, 2, *overrides, "parallel.pp=2", "train.max_steps=4", module=runs.PATIENT)
    assert (tmp_path / "checkpoints" / "latest").resolve() == runs.saved(tmp_path, 4)
    # One rank of the two can write no file beyond 100 kB.
    ranks = hindered(tmp_path, ["1", "limit", "100000"], *overrides, "wandb.mode=offline")
    assert 1 in ranks.wait(60)
    said = (tmp_path / "rank0.log").read_text()
    assert failed_or_left_out(
        said, "could not be saved (OSError on rank 1: [Errno 27] File too large)", (STEPS - 4) // 2
    )
    assert "goes on from the save before" not in said and "done" in said
    assert runs.curve(tmp_path) == runs.curve(undisturbed)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step-00000002",
        "step-00000004",
    ]
    manifest.check_files(runs.saved(tmp_path, 4), manifest.read(runs.saved(tmp_path, 4)))
    assert not (tmp_path / "summary.json").exists()
    runs.finish(tmp_path, 2, *overrides, "parallel.pp=2")
    assert runs.digests(runs.saved(tmp_path, STEPS)) == runs.digests(runs.saved(undisturbed, STEPS))
    assert runs.curve(tmp_path) == runs.curve(undisturbed)


@pytest.mark.launch
def test_a_folder_that_takes_nothing_costs_no_step(overrides, undisturbed, tmp_path):
    (tmp_path / "checkpoints").symlink_to("/proc")
    (beats := tmp_path / "beats").mkdir()
    ranks = runs.start(tmp_path, 2, *overrides, "parallel.pp=2", **{FOLDER: str(beats)})
    assert 1 in ranks.wait(60)
    told = json.loads(failure_of(beats, 0).read_text())  # to whoever may start the run again
    assert told["reason"].startswith(f"step {STEPS} could not be saved (")
    said = (tmp_path / "rank0.log").read_text()
    assert failed_or_left_out(said, "could not be saved", saves=STEPS // 2)
    assert runs.curve(tmp_path) == runs.curve(undisturbed)


@pytest.mark.launch
def test_a_slow_disk_has_one_save_at_a_time_and_training_goes_on(overrides, undisturbed, tmp_path):
    ranks = hindered(tmp_path, ["1", "delay", "0.4"], *overrides, "checkpoint.every_steps=1")
    most = 0
    while None in ranks.codes:
        most = max(most, len(list((tmp_path / "checkpoints").glob("step-*.tmp"))))
        time.sleep(0.01)
    assert ranks.wait(60) == [0, 0] and most == 1
    said = (tmp_path / "rank0.log").read_text()
    skipped = said.count(BUSY)
    saved = len(list((tmp_path / "checkpoints").glob("step-*")))
    assert skipped >= 3 and saved >= 2 and skipped + saved == STEPS
    assert runs.curve(tmp_path) == runs.curve(undisturbed)
    assert runs.digests(runs.saved(tmp_path, STEPS)) == runs.digests(runs.saved(undisturbed, STEPS))


@pytest.mark.launch
def test_a_folder_that_is_not_shared_is_no_checkpoint(overrides, tmp_path):
    (tmp_path / "other machine").mkdir()
    ranks = hindered(tmp_path, ["1", "elsewhere", str(tmp_path / "other machine")], *overrides)
    assert 1 in ranks.wait(60)
    assert "all machines must share the run folder" in (tmp_path / "rank0.log").read_text()
    assert not list((tmp_path / "checkpoints").glob("step-*"))
