"""`deepnarrow dry-run`: what it prints of a small job, and what it says of one that does not fit or pair up."""

import json
from dataclasses import replace

import pytest

from launch import cli
from launch.dry_run import command, ranks
from launch.dry_run.ranks import GIB, Ran, needs, run_all, what_would_fit
from parallel.dry_run.distinct import classes
from parallel.memory import Memory
from parallel.plan.operations import GroupKind
from tests.shapes import preset
from train.job import job_of

SMALL = ["tiny", "model.n_layers=4", "train.seq_len=64", "train.global_batch=32"]


def said(capsys, *arguments):
    code = cli.main(["dry-run", *arguments])
    return code, capsys.readouterr()


@pytest.fixture(scope="module")
def ran():
    """Two stages on two tensor-parallel ranks and two replicas: the two first ranks of each, in two processes."""
    config = preset("tiny", *SMALL[1:], "parallel.pp=2", "parallel.tp=2", "parallel.dp=2")
    job = job_of(config)
    return run_all(job, config.optimizer, classes(job))


def test_one_rank_for_scripts(capsys):
    code, out = said(capsys, *SMALL, "--ranks", "0", "--json")
    found = json.loads(out.out)
    assert code == 0 and found["fits"] and found["verdict"].startswith("fits a GPU of 80 GiB: stage 0 needs 0.0 GiB at")
    assert "running 1 of 1 ranks" in out.err
    (rank,) = found["ranks"]
    assert sum(rank["memory"]["by_kind"].values()) == rank["memory"]["peak"] > rank["memory"]["state"]["weights"] > 0
    assert (found["micro_batches"], found["micro_batches_run"], found["messages"]) == (32, 2, [])


def test_what_is_printed_of_all_ranks(ran):
    text = command.as_text(ran)
    assert text.startswith("8 ranks, dp2 x pp2 x tp2 with sequence parallelism; 1f1b, bf16, micro-batches of 1 x 64")
    assert "6 of a step's 16 micro-batches were run" in text
    assert text.count("2 ranks   ") >= 4  # of each stage two classes, each of two replicas
    assert "pair up, by dry runs of 4 ranks" in text
    found = command.facts(ran)
    assert [rank["stands_for"]["number"] for rank in found["ranks"]] == [2, 2, 2, 2]
    by_key = {(one["kind"], one["operation"]): one for one in found["messages"]}
    part = 32 * 128 * 2  # this rank's tokens of a sequence of d_model values in bf16
    assert by_key["pp", "send"]["number"] == 16 and by_key["pp", "send"]["bytes"] == 16 * part
    assert by_key["world", "all_reduce"] == {**by_key["world", "all_reduce"], "number": 1, "bytes": 40, "ranks": 8}
    assert found["matching"]["messages"] > 8 and not found["matching"]["problems"]
    assert command.judged(ran, 80.0, 4.0).startswith("fits a GPU of 80 GiB: stage ")


def test_what_does_not_fit_is_told_with_what_would(ran):
    most = max(map(needs, ran.runs.values()))
    room = most - 30_000
    works = what_would_fit(ran, room)
    assert works is not None and works[1] <= room
    verdict = command.judged(ran, 4 + room / GIB, 4.0)
    assert verdict.startswith("does not fit a GPU of 4.0") and "pass of micro-batch" in verdict
    assert verdict.endswith(f"; {works[0]} would, with 0.0 GiB") and "parallel.recompute=" in verdict
    assert command.judged(ran, 4 + 1e-6, 4.0).endswith("; more pipeline or tensor-parallel ranks would")


def test_what_fits_by_the_formula_alone_is_not_promised(ran, monkeypatch):
    monkeypatch.setattr(ranks, "fullest", lambda job: (0, Memory(0.0, 0.0, 0.0)))
    assert what_would_fit(ran, 1000.0) is None


def test_messages_that_do_not_pair_up_are_told(ran):
    first, *others = ran.runs
    run = ran.runs[first]
    last = max(place for place, one in enumerate(run.exchanges) if one.kind is GroupKind.tp)
    without = [one for place, one in enumerate(run.exchanges) if place != last]
    broken = Ran(ran.job, ran.optimizer, {first: replace(run, exchanges=without), **{k: ran.runs[k] for k in others}})
    text = command.as_text(broken)
    assert "groups disagree" in text and "on rank 0 and" in text.splitlines()[-1]


def test_bad_options_are_told_before_anything_runs(capsys):
    code, out = said(capsys, *SMALL, "--ranks", "0,7,x", "--device-gib", "2")
    assert code == 2 and not out.out
    assert out.err.splitlines() == [
        "--device-gib=2: is above the 4 GiB that CUDA, NCCL and the allocator take; 80 would work",
        "--ranks=0,7,x: '7', 'x': not among the ranks from 0 to 0; distinct, all, or some of them as in --ranks=0 "
        "would work",
    ]
    code, out = said(capsys, *SMALL, "parallel.pp=9")
    assert code == 2 and "parallel.pp=9" in out.err
