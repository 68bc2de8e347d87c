"""Text and scores by step: what is kept in the run folder, and what W&B is shown."""

import json

from train import tables
from train.tables import Tables


def test_text_is_kept_by_step_and_a_run_that_goes_back_drops_what_comes_after(tmp_path):
    shown = []
    first = Tables(tmp_path, None, lambda *table: shown.append(table))
    assert first.files == []  # no file before there is a sample
    first.add_samples(2, ["a", "b"], ["ax", "by"])
    first.add_samples(4, ["a"], ["az"])
    again = Tables(tmp_path, 3, lambda *table: shown.append(table))
    again.add_samples(4, ["a"], ["aq"])
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == [(2, "a", "ax"), (2, "b", "by"), (4, "a", "aq")]
    columns = ["step", "prompt", "text"]
    assert shown[1:] == [
        ("samples", columns, [[2, "a", "ax"], [2, "b", "by"], [4, "a", "az"]]),
        ("samples", columns, [[2, "a", "ax"], [2, "b", "by"], [4, "a", "aq"]]),
    ]
    assert [file.path.name for file in again.files] == ["samples.jsonl"]


def test_scores_are_shown_whole_when_a_record_brings_some(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(tables, "ROWS", 3)
    kept = Tables(tmp_path, None, lambda *table: shown.append(table))
    for record in ({"step": 1}, {"step": 2, "tasks": {"t": {"accuracy": 0.5, "bits_per_byte": 2.0}}}, {"step": 3},
                   {"step": 4, "tasks": {"t": {"accuracy": 0.6, "bits_per_byte": 1.5}}}):  # fmt: skip
        kept.keep_scores(record)
        kept.show_scores(record)
    assert [rows for _, _, rows in shown] == [
        [[2, "t", "accuracy", 0.5], [2, "t", "bits_per_byte", 2.0]],
        [[2, "t", "bits_per_byte", 2.0], [4, "t", "accuracy", 0.6], [4, "t", "bits_per_byte", 1.5]],  # the newest
    ]
    assert shown[0][:2] == ("eval_table", ["step", "task", "figure", "value"])
