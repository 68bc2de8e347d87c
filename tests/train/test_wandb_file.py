"""The format of W&B's offline files, as its own client writes it and as a killed one leaves it."""

import struct

import pytest
from wandb.proto import wandb_internal_pb2 as proto

from train.wandb_file import NEWEST, last_offline_step, records

BLOCK = 32768
BEGINS = bytes.fromhex("3a572642e1be00")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def written(steps, note="", begins=BEGINS):
    """A file as LevelDB's writer makes it: a record goes on in the next block where there is no room for all of it."""
    data = bytearray(begins)
    for step in steps:
        record = proto.Record()
        record.history.step.num = step
        record.history.item.add(key="note", value_json=note)
        rest, first = record.SerializeToString(), True
        while rest is not None:
            if (room := BLOCK - len(data) % BLOCK) < 7:
                data += b"\0" * room
                room = BLOCK
            part, left = rest[: room - 7], rest[room - 7 :] or None
            kind = (FULL if left is None else FIRST) if first else (LAST if left is None else MIDDLE)
            data += struct.pack("<IHB", 0, len(part), kind) + part
            rest, first = left, False
    return bytes(data)


def steps_of(path):
    return [record.history.step.num for record in records(path)]


@pytest.mark.parametrize("note", ["", "a" * 1000, "b" * 100_000], ids=["short", "some to a block", "over blocks"])
def test_records_are_read_however_they_lie_in_blocks(note, tmp_path):
    path = tmp_path / "run.wandb"
    path.write_bytes(written(range(200), note))
    assert steps_of(path) == [*range(200)]


def test_what_a_killed_process_left_is_read_up_to_there(tmp_path):
    path, whole = tmp_path / "run.wandb", written(range(5), "c" * 100)
    two = len(written(range(2), "c" * 100))
    for end, found in [(0, 0), (3, 0), (7, 0), (two - 1, 1), (two, 2), (two + 3, 2), (len(whole), 5)]:
        path.write_bytes(whole[:end])
        assert len(steps_of(path)) == found, end
    path.write_bytes(whole[:two] + b"\0" * 500)  # room that a file system had given it
    assert len(steps_of(path)) == 2


def test_the_last_step_is_that_of_all_parts_of_the_run(tmp_path):
    assert last_offline_step(tmp_path, "abc") is None
    for part, (run, steps) in enumerate([("abc", range(3)), ("abc", range(3, 9)), ("other", range(70)), ("void", [])]):
        folder = tmp_path / f"offline-run-2026010{part}_000000-{run}"
        folder.mkdir()
        (folder / f"run-{run}.wandb").write_bytes(written(steps))
    assert [last_offline_step(tmp_path, run) for run in ("abc", "other", "void")] == [8, 69, -1]


@pytest.mark.parametrize("begins", ["3a572642e1be01", "3a572642e1bf00", "00000000000000"])
def test_a_file_of_another_format_is_refused_by_a_sentence(begins, tmp_path):
    path = tmp_path / "run.wandb"
    path.write_bytes(written([1, 2], begins=bytes.fromhex(begins)))
    said = rf"run.wandb begins with {begins}, .*; moving it away, and wandb {NEWEST} for what is to come, would work$"
    with pytest.raises(ValueError, match=said):
        steps_of(path)
