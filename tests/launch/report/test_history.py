import json

import numpy as np

from launch.report.history import PART, history_of
from launch.run_folder import RunFolder
from tests.launch.report.folders import record, write_run


def test_figures_that_come_and_go_stand_beside_the_steps_that_have_them(tmp_path, monkeypatch):
    made = [record(1), record(2, val_sets={"web": {"loss": 2.0}}), record(3, slow_ranks={"7": 1.5}), record(4)]
    monkeypatch.setattr("launch.columns._BYTES", len(json.dumps(made[0])) + 40)  # about a record a chunk
    history = history_of(RunFolder(write_run(tmp_path / "run", made)).chunks())
    assert len(history) == 4 and history["step",].tolist() == [1, 2, 3, 4]
    np.testing.assert_array_equal(history["val_sets", "web", "loss"], [np.nan, 2.0, np.nan, np.nan])
    np.testing.assert_array_equal(history["slow_ranks", "7"], [np.nan, np.nan, 1.5, np.nan])
    assert np.isnan(history["no", "such"]).all() and len(history["no", "such"]) == 4
    assert history.against["hours"].tolist() == [0.5 / 3600, 1 / 3600, 1.5 / 3600, 2 / 3600]


def test_parts_are_found_by_what_stands_in_their_place(tmp_path):
    stages = [float(stage) for stage in range(12)]
    sets = {"b": {"loss": 1.0}, "a": {"loss": 2.0, "bits_per_byte": 1.0}}
    made = [record(1, memory_gib=stages, val_sets=sets)]
    history = history_of(RunFolder(write_run(tmp_path / "run", made)).chunks())
    assert list(history.parts(("memory_gib", PART))) == [str(stage) for stage in range(12)]  # 10 behind 9
    assert history.parts(("val_sets", PART, "loss")) == {
        "b": ("val_sets", "b", "loss"),
        "a": ("val_sets", "a", "loss"),
    }
    assert list(history.parts(("val_sets", PART, "bits_per_byte"))) == ["a"]
    assert history.parts(("loss",)) == {"": ("loss",)} and history.parts(("mfu",)) == {}


def test_a_step_that_stands_there_twice_counts_once_as_it_was_last(tmp_path):
    made = [record(1), record(2, loss=9.0), record(3), record(2, loss=5.0), {"loss": 1.0}]
    history = history_of(RunFolder(write_run(tmp_path / "run", made)).chunks())
    assert history["step",].tolist() == [1, 2, 3] and history["loss",][1] == 5.0
    assert (history.repeated, history.without_step) == (1, 1)


def test_no_records_are_none(tmp_path):
    history = history_of(RunFolder(tmp_path).chunks())
    assert len(history) == 0 and history.parts(("loss",)) == {} and len(history["loss",]) == 0
