import pytest

from train.checkpoint import folder
from train.checkpoint.folder import clean, mark_damaged, name_of, newest_first, point_at, prune, step_of, temporary


@pytest.fixture
def steps(tmp_path):
    for step in (100, 200, 250, 300, 1000):
        (tmp_path / name_of(step)).mkdir()
        (tmp_path / name_of(step) / "manifest.json").write_text("{}")
    return tmp_path


def left(path):
    return [step_of(found) for found in newest_first(path)]


def test_only_whole_checkpoints_are_found_newest_first(steps):
    temporary(steps / name_of(2000)).mkdir()
    (steps / "step-00003000.damaged").mkdir()
    (steps / name_of(4000)).write_text("no folder")
    (steps / "notes").mkdir()
    assert left(steps) == [1000, 300, 250, 200, 100]
    assert newest_first(steps / "nowhere") == []


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, None, [1000]), (3, None, [1000, 300, 250]), (2, 100, [1000, 300, 200, 100]), (1, 500, [1000])],
)
def test_the_newest_and_those_for_good_are_kept(keep_last, keep_every, kept, steps):
    prune(steps, keep_last, keep_every)
    assert left(steps) == kept


def test_a_half_deleted_checkpoint_does_not_look_whole(steps, monkeypatch):
    monkeypatch.setattr(folder, "remove", lambda path: None)
    prune(steps, 4, None)
    assert left(steps) == [1000, 300, 250, 200] and temporary(steps / name_of(100)).is_dir()


def test_leftovers_are_cleaned_and_nothing_else_is(steps):
    temporary(steps / name_of(2000)).mkdir()
    (temporary(steps / name_of(2000)) / "rank00000.safetensors").write_bytes(b"half")
    (steps / "latest.tmp").symlink_to(name_of(100))
    (steps / "mine.tmp").write_text("mine")
    clean(steps)
    assert left(steps) == [1000, 300, 250, 200, 100]
    assert {path.name for path in steps.iterdir() if path.name.endswith(".tmp")} == {"mine.tmp"}


def test_latest_leads_to_the_newest_and_past_a_damaged_one(steps):
    point_at(steps / name_of(300))
    point_at(steps / name_of(1000))
    assert (steps / "latest").resolve() == steps / name_of(1000)
    assert mark_damaged(steps / name_of(1000)).name == "step-00001000.damaged"
    assert (steps / "latest").resolve() == steps / name_of(300) and left(steps)[0] == 300
    (steps / name_of(1000)).mkdir()
    assert mark_damaged(steps / name_of(1000)).name == "step-00001000.damaged2"
