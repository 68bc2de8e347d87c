"""A run of several sources, batches and stages: killed anywhere, it goes on in all of them, on any layout."""

import shutil
import signal

import pytest

from tests.train.checkpoint import runs


@pytest.fixture(scope="module")
def course(overrides, corpus, tmp_path_factory):
    """Steps of 8, then 16 sequences of 32 tokens, then of 16 tokens of other shares."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("web", "code")}
    for index, path in enumerate(sorted(corpus.iterdir())):
        shutil.copy(path, folders["web" if index % 2 else "code"])
    sources = ", ".join(f"{name}: {{path: {folder}, weight: {2 + len(name)}}}" for name, folder in folders.items())
    return [
        *[override for override in overrides if not override.startswith(("data=", "data.path", "train.global_batch"))],
        *[f"data.sources={{{sources}}}", "train.global_batch='0:8 1e3:16'"],
        "data.stages=[{until: 2e3}, {until: 1e13, weights: {web: 1, code: 9}, seq_len: 16}]",
    ]


def taken(folder):
    keys = ("tokens", "source_tokens", "global_batch", "seq_len")
    return {record["step"]: [record[key] for key in keys] for record in runs.metrics(folder)}


@pytest.mark.launch
def test_killed_and_started_again_on_another_layout_it_is_as_if_nothing_had_been(course, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.finish(whole, 2, *course, "parallel.pp=2")
    sizes = {step: (batch, seq_len) for step, (_, _, batch, seq_len) in taken(whole).items()}
    assert [*sizes.values()] == [(8, 32)] * 4 + [(16, 32)] * 2 + [(16, 16)] * 6
    for step, (tokens, of_sources, _, _) in taken(whole).items():
        assert sum(of_sources.values()) == tokens
        if step <= 6:  # by weights of 6 and 5, to within a sequence
            assert abs(of_sources["code"] - tokens * 6 / 11) < 32
    at_border, at_end = (taken(whole)[step][1] for step in (6, 12))
    assert abs(at_end["code"] - at_border["code"] - 0.9 * 6 * 256) < 16

    ranks = runs.start(killed, 2, *course, "parallel.pp=2", "checkpoint.every_steps=1")
    metrics = killed / "metrics.jsonl"
    runs.wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 5, ranks)
    ranks.signal(signal.SIGKILL)
    ranks.wait(60)
    said = runs.finish(killed, 2, *course, "parallel.dp=2", "train.micro_batch=4")
    assert "going on after step" in said and "lengths or mixture are others" not in said
    assert taken(killed) == taken(whole)
    one, other = runs.curve(whole), runs.curve(killed)
    assert all(one[step] == pytest.approx(other[step], rel=1e-4) for step in one)


@pytest.mark.launch
def test_another_mixture_and_batch_go_on_from_what_was_trained_on(course, tmp_path):
    runs.finish(tmp_path, 1, *course, "train.max_steps=5")
    before = taken(tmp_path)[5]
    said = runs.finish(tmp_path, 1, *course, "train.global_batch=4", "data.stages=[]", "data.sources.web.weight=0")
    assert "the run goes on from the 48 samples and 1,536 tokens that it has trained on" in said
    after = taken(tmp_path)
    assert [after[step][0] for step in (5, 6, 12)] == [1536, 1536 + 128, 1536 + 7 * 128]
    assert after[12][1] == {"web": before[1]["web"], "code": before[1]["code"] + 7 * 128}
    assert [*after] == [*range(1, 13)]
