"""`deepnarrow plan` as a user meets it: what it prints can be pasted, written, explained, and refused in a sentence."""

import json
import shlex
from dataclasses import replace
from functools import cache

import pytest

from conf.compose import compose_overrides
from launch import cli
from launch.plan import dry_runs, explain
from launch.plan.request import KEYS, overrides_of, read, value_of, with_choice
from launch.plan.rows import Peak, parts_of
from model.problems import BadInput
from parallel.dry_run import run as run_dry
from parallel.plan.predict import predict
from parallel.plan.search import fastest_of_each, first_fitting, search
from train.job import job_of

SMALL = ["model=tiny", "train.global_batch=32"]
CLUSTER = "1x2xh100"


def plan(capsys, *arguments, cluster=CLUSTER, dry=0):
    assert cli.main(["plan", *arguments, "--cluster", str(cluster), "--dry-runs", str(dry)]) == 0
    return capsys.readouterr().out


def bad(capsys, *arguments):
    assert cli.main(["plan", *arguments]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@cache
def searched(*overrides, cluster=CLUSTER):
    """What is planned, and all that was found; kept for the tests that ask again."""
    request = read([*SMALL, *overrides], str(cluster), None)
    return request, search(request.task, request.space, request.problems, predict)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A file of two GPUs that are too small for some layouts of the tiny model."""
    path = tmp_path_factory.mktemp("cluster") / "narrow.yaml"
    path.write_text("preset: h100\nnodes: 1\ngpus_per_node: 2\nmemory_gib: 0.05\nreserved_gib: 0.012\n")
    return path


def test_what_is_printed_composes_to_the_job_that_was_planned():
    _, found = searched()
    recomputing = searched("parallel.recompute=ffn", "parallel.head_pieces=4")[1]
    for one in [*fastest_of_each(found.candidates), *recomputing.candidates[:2]]:
        composition = compose_overrides([*SMALL, *overrides_of(one.choice)])
        assert composition.problems == []
        assert job_of(composition.config, num_processes=2) == one.job
    assert len({one.choice.schedule for one in found.candidates}) == 5


def test_the_numbers_of_a_row_follow_from_each_other(capsys):
    found = json.loads(plan(capsys, *SMALL, "--json", "--price", "3", "--top", "3"))
    assert len(found["rows"]) == 3 and found["search"]["timed"] > 20
    first = found["rows"][0]
    assert sum(first["parts"].values()) == pytest.approx(first["seconds"])
    tokens = 32 * 256 / first["seconds"] / 2
    assert first["tokens_per_second_per_gpu"] == pytest.approx(tokens)
    steps = -(-500_000 // (32 * 256))
    assert first["days"] == pytest.approx(steps * first["seconds"] / 86400)
    assert first["cost"] == pytest.approx(first["days"] * 24 * 2 * 3)
    assert first["memory"]["peak"] == sum(first["memory"]["parts"].values()) and not first["memory"]["dry_run"]
    assert [row["seconds"] for row in found["rows"]] == sorted(row["seconds"] for row in found["rows"])


def test_a_ramp_of_batches_takes_days_of_each_batch(capsys):
    ramp = ["model=tiny", "train.global_batch='0:8 40960:32'", "train.total_tokens=122880"]
    found = json.loads(plan(capsys, *ramp, "parallel.pp=2", "train.micro_batch=4", "--json", "--top", "1"))
    assert found["task"]["global_batch"] == 32
    choice = searched("parallel.pp=2", "train.micro_batch=4")[1].candidates[0].choice
    request = read(ramp, CLUSTER, None)
    seconds = [predict(request.task_of(batch, 256).job(choice), request.cluster).seconds for batch in (8, 32)]
    assert found["rows"][0]["overrides"] == overrides_of(choice)
    assert found["rows"][0]["days"] == pytest.approx((20 * seconds[0] + 10 * seconds[1]) / 86400)


def test_keys_that_the_user_has_set_are_kept_and_said(capsys, tmp_path):
    said = plan(capsys, *SMALL, "parallel.tp=2", "parallel.recompute=full", "train.micro_batch=1")
    assert "kept as they are set: parallel.tp=2 parallel.recompute=full train.micro_batch=1" in said
    (tmp_path / "mine.yaml").write_text("parallel: {pp: 2}\ntrain: {global_batch: 32}\n")
    options = [f"--config-dir={tmp_path}", "--config-name=mine", "parallel.dp=null"]
    request = read(options, CLUSTER, None)
    assert request.fixed == {"pp": 2}
    found = search(request.task, request.space, request.problems, predict)
    assert found.candidates and {one.choice.pp for one in found.candidates} == {2}
    # A preset's micro-batch is no wish of the user's, and a schedule alone asks for a pipeline.
    assert read(["model=tiny_mha"], CLUSTER, None).fixed == {}
    only = searched("parallel.schedule=zbv")[1].candidates
    assert {(one.choice.pp, one.choice.schedule.name) for one in only} == {(2, "zbv")}


@pytest.mark.parametrize("where", ["plan", "experiment/plan"])
def test_what_is_written_trains_what_was_planned(where, tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule" / "mine.yaml").write_text("decay: cosine\nwarmup_steps: 7\n")
    out = tmp_path / f"{where}.yaml"
    command = [
        *SMALL,
        "schedule=mine",
        "data=files",
        "data.path='/x y'",
        "name=a-${preset}",
        f"--config-dir={tmp_path}",
    ]
    said = plan(capsys, *command, "--write", str(out))
    how = shlex.split(said.rsplit("to train with the first: ", 1)[1])
    named = "--config-name plan" if where == "plan" else "+experiment=plan"
    assert how == ["deepnarrow", "train", "--config-dir", str(tmp_path), *named.split()]
    arguments = [f"--config-dir={tmp_path}", named.replace(" ", "=")]
    composition = compose_overrides(arguments)
    request = read(command, CLUSTER, None)
    found = search(request.task, request.space, request.problems, predict)
    assert composition.problems == []
    assert composition.config == with_choice(request.config, found.candidates[0].choice)
    assert composition.config.data.path == "/x y" and composition.config.name == "a-tiny"
    plan(capsys, *command, "--write", str(out))  # what a plan has written, a plan replaces


def test_what_another_has_written_is_not_replaced(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("train: {seed: 3}\n")
    for name, said in (
        ("mine.yaml", "no plan has written it"),
        ("mine.json", "mine.yaml would work"),
        ("config.yaml", "would hide the package's own"),
        ("no/such/p.yaml", "is no folder"),
    ):
        assert said in bad(capsys, *SMALL, "--cluster", CLUSTER, "--write", str(tmp_path / name))
    assert (tmp_path / "mine.yaml").read_text() == "train: {seed: 3}\n"


def test_why_a_layout_loses(narrow):
    request, found = searched()
    best, last = found.candidates[0], found.candidates[-1]
    of = explain.explain(request, found, " ".join(overrides_of(last.choice)))
    assert of.choice == last.choice and of.fits and of.place == len(found.candidates)
    assert sum(of.lost.values()) == pytest.approx(last.seconds - best.seconds)
    text = explain.as_text(request, found, of)
    assert f"place {of.place:,} of {of.place:,}" in text and "more than the first" in text
    winner = explain.explain(request, found, " ".join(overrides_of(best.choice)))
    assert winner.place == 1 and winner.changes == [] and not any(winner.lost.values())
    refused = explain.explain(request, found, "parallel.pp=2 parallel.schedule=1f1b parallel.virtual_stages=2")
    assert "parallel.schedule=1f1b has one stage on each rank" in explain.as_text(request, found, refused)
    refused = explain.explain(request, found, "parallel.pp=4")
    assert "2 processes cannot be laid out as pipelines of 4" in explain.as_text(request, found, refused)
    request, found = searched(cluster=narrow)
    of = explain.explain(request, found, "parallel.pp=1 train.micro_batch=8")
    assert not of.fits and of.would_fit
    assert "does not fit: rank 0" in explain.as_text(request, found, of)
    assert of.would_fit[0] in {one.choice for one in found.candidates}


def test_one_change_at_a_time_is_what_a_prediction_of_it_says():
    request, found = searched()
    best = found.candidates[0].choice
    other = next(one for one in found.candidates if one.choice.schedule is best.schedule and one.choice != best)
    of = explain.explain(request, found, " ".join(overrides_of(other.choice)))
    differing = [name for name in KEYS if name != "dp" and getattr(best, name) != getattr(other.choice, name)]
    assert len(of.changes) == len(differing) > 0
    for name, (override, said) in zip(differing, of.changes, strict=True):
        assert override.startswith(f"{KEYS[name]}=")
        if name not in ("pp", "tp"):
            changed = replace(other.choice, **{name: getattr(best, name)})
            if not request.problems(changed):
                assert f"{predict(request.task.job(changed), request.cluster).seconds:,.3g} s a step" in said


def test_recomputation_is_a_part_of_its_own():
    request, found = searched("parallel.recompute=full", "parallel.head_pieces=4")
    choice, prediction = found.candidates[0].choice, found.candidates[0].prediction
    parts = parts_of(request.task, choice, prediction)
    assert parts["recomputed"] > 0 and sum(parts.values()) == pytest.approx(prediction.seconds)


def test_what_cannot_be_planned_is_said_all_at_once(capsys, narrow):
    said = bad(capsys, "tiny", "optimizer.lr=-1", "--cluster", "1xtwoxh200", "--price", "-1").splitlines()
    assert len(said) == 3 and "optimizer.lr=-1.0" in said[0] and "--price=-1" in said[1] and "'two'" in said[2]
    assert "--cluster=32x8xh100 would work" in bad(capsys, "tiny")
    said = bad(capsys, "tiny", "--cluster", CLUSTER, "--top", "0", "--picture", "x.gif", "--explain", "train.seed=2")
    assert [line.partition("=")[0] for line in said.splitlines()] == ["--top", "--explain", "--picture"]
    said = bad(capsys, "tiny", "--cluster", CLUSTER, "train.global_batch=5", "parallel.dp=2")
    assert "train.global_batch=4 or train.global_batch=6" in said
    for key in ("pp", "tp", "dp"):
        said = bad(capsys, "tiny", "--cluster", CLUSTER, f"parallel.{key}=0")
        assert f"parallel.{key}=0: must be at least 1" in said and "parallel.dp=-" not in said
        assert f"parallel.{key}=0: must be at least 1" in plan(capsys, *SMALL, "--explain", f"parallel.{key}=0")
    assert bad(capsys, "tiny", "cluster=foo").startswith("cluster=foo: ")
    assert "2 processes" in bad(capsys, "tiny", "--cluster", CLUSTER, "parallel.pp=3")
    wide = narrow.with_name("wide.yaml")
    wide.write_text(narrow.read_text().replace("0.05", "2"))
    said = bad(capsys, "12x768", "--cluster", str(wide))
    assert "no layout of 12x768 fits 1 x 2 H100 SXM" in said and "such machines would work" in said
    machines = int(said.split(" such machines")[0].rsplit(" ", 1)[1])
    for nodes, fits in ((machines, True), (machines // 2, False)):
        request = read(["12x768"], str(wide), None)
        request = replace(request, cluster=replace(request.cluster, nodes=nodes))
        assert (first_fitting(request.task, request.space, request.problems) is not None) == fits


class _Here:
    """A pool of processes whose work is done by a function here."""

    def __init__(self, peaks):
        self._peaks = peaks

    def __enter__(self):
        return self

    def __exit__(self, *how):
        pass

    def map(self, _, jobs, ranks):
        return [dry_runs.DryRun(Peak(rank, {"activations": self._peaks(job)}, "somewhere"), [], 1)
                for job, rank in zip(jobs, ranks, strict=True)]  # fmt: skip


def test_a_layout_that_a_dry_run_shows_not_to_fit_drops_out(monkeypatch, capsys):
    request, found = searched()
    first = found.candidates[0]
    monkeypatch.setattr(dry_runs, "pool", lambda: _Here(lambda job: 2.0**40 if job == first.job else 2.0**30))
    checked = dry_runs.check(request, found.candidates, 2)
    assert checked.candidates == found.candidates[1:] and len(checked.dropped) == 1
    assert "1,024.0 GiB" in checked.dropped[0] and first.choice in checked.runs and len(checked.runs) == 3
    last = shlex.join(overrides_of(found.candidates[-1].choice))
    said = plan(capsys, *SMALL, "--explain", last, dry=2)
    left = len(checked.candidates)
    assert f"place {left} of {left}" in said  # of those that fit by their dry runs
    assert f"dropped: {checked.dropped[0].split(':')[0]}" in said and "1.0 on rank" in said
    assert "memory of the first 2 by dry runs" in said
    monkeypatch.setattr(dry_runs, "pool", lambda: _Here(lambda job: 2.0**40))
    with pytest.raises(BadInput, match="more machines would work"):
        dry_runs.check(request, found.candidates[:2], 2)


def test_the_memory_of_the_best_is_that_of_a_dry_run(tmp_path, capsys):
    command = [*SMALL, "parallel.pp=2", "parallel.schedule=zbv", "train.micro_batch=2", "--json", "--top", "1"]
    found = json.loads(plan(capsys, *command, "--picture", str(tmp_path / "step.svg"), dry=1))
    memory = found["rows"][0]["memory"]
    assert memory["dry_run"] and memory["at"].split()[0] in ("F", "B", "W")
    assert memory["peak"] == sum(memory["parts"].values()) != memory["formula"]
    assert memory["peak"] == pytest.approx(memory["formula"], rel=0.1)
    job = job_of(compose_overrides([*SMALL, *found["rows"][0]["overrides"]]).config, num_processes=2)
    assert memory["peak"] == run_dry(job, memory["rank"]).peak  # the ids of all micro-batches are counted once
    drawn = (tmp_path / "step.svg").read_text()
    assert "zbv" in drawn or "path" in drawn
    assert value_of(compose_overrides([*SMALL, *found["rows"][0]["overrides"]]).config, "pp") == 2
