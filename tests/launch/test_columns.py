import json

import numpy as np
import pytest

from launch import columns
from launch.columns import chunks
from launch.run_folder import RunFolder
from tests.launch.folders import records, write_run
from train.records import METRICS

OF_MANY_FORMS = [
    {"step": 1, "w": [1, 2.5], "sets": {"a": {"x": 1}, "b": {"x": 2}}, "on": True, "nonfinite": ["loss"], "loss": None},
    {"step": 2, "loss": 1, "skipped": "spike"},
    {"step": 3, "w": [1], "sets": {"a": {"x": 1.5}}, "loss": 2.5},
    {"step": 4, "w": [1, None, 3], "on": False},
]


def as_lines(objects):
    return b"".join(json.dumps(one).encode() + b"\n" for one in objects)


def read(path, names=None):
    return [found for found, _ in chunks(path, names)], sum(torn for _, torn in chunks(path, names))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_both_ways_of_parsing_find_the_same(count, tmp_path):
    (tmp_path / "a").write_bytes(as_lines(OF_MANY_FORMS[:count]))
    (tmp_path / "b").write_bytes(as_lines(OF_MANY_FORMS[:count]) + b"{torn\n")
    ((fast,), none), ((slow,), torn) = read(tmp_path / "a"), read(tmp_path / "b")
    assert (none, torn) == (0, 1) and fast.keys() == slow.keys()
    for figure, values in fast.items():
        np.testing.assert_array_equal(values, slow[figure])
    if count == 4:
        np.testing.assert_array_equal(fast["w", "1"], [2.5, np.nan, np.nan, np.nan])
        np.testing.assert_array_equal(fast["w", "2"], [np.nan, np.nan, np.nan, 3])
        np.testing.assert_array_equal(fast["sets", "a", "x"], [1, np.nan, 1.5, np.nan])
        np.testing.assert_array_equal(fast["on",], [1, np.nan, np.nan, 0])
        assert ("skipped",) not in fast and ("nonfinite", "0") not in fast


def test_figures_that_are_asked_for_are_there_whatever_records_have(tmp_path):
    (tmp_path / "a").write_bytes(as_lines(OF_MANY_FORMS))
    ((found,), _) = read(tmp_path / "a", ["loss", "nothing"])
    np.testing.assert_array_equal(found["loss",], [np.nan, 1, 2.5, np.nan])
    assert np.isnan(found["nothing",]).all() and found.keys() == {("loss",), ("nothing",)}


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_records_are_whole_wherever_a_chunk_ends(size, tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "_BYTES", size)
    write_run(tmp_path, records(20))
    with open(tmp_path / METRICS, "ab") as file:
        file.write(b'\nnull\n{"step": 21}\n{"step": 22')  # a blank line, no object, and one that is not ended
    run = RunFolder(tmp_path)
    read = run.columns("step", "tokens")
    assert read["step"].tolist() == [*range(1, 22)] and read["tokens"][:20].tolist() == [*range(1000, 21_000, 1000)]
    assert run.faults == ["metrics.jsonl: some of its lines are no records"]
    assert sum(len(chunk["step",]) for chunk in run.chunks() if ("step",) in chunk) == 21


def test_a_file_that_is_not_there_has_no_records(tmp_path):
    run = RunFolder(tmp_path)
    assert run.columns("step")["step"].tolist() == [] and [*run.chunks()] == [] and not run.faults
