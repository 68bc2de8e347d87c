"""Whole runs that evaluate as they train, on every kind of layout, started again, and measured again by the command."""

import json
from types import SimpleNamespace

import pytest

from launch.cli import main
from tests.ranks import nursery
from tests.train.checkpoint import runs
from tests.train.evaluate.test_tasks import CHOICES, CLOZES, written
from train.events import RESTART

LAYOUTS = {"pp1": 1, "pp2": 2, "pp4": 4, "tp2": 2, "dp2": 2}
STEPS = 3


@pytest.fixture(scope="module")
def evaluated(corpus, overrides, tmp_path_factory):
    """The same run on each layout; that of one process is stopped after two steps and started again."""
    root = tmp_path_factory.mktemp("evaluated")
    tasks = [written(root / "words.jsonl", CLOZES * 4), written(root / "sky.jsonl", CHOICES * 4), "continuation"]
    named = ",".join(map(str, tasks))
    asked = [
        "data.path=null",
        f"data.sources={{a: {{path: '{corpus}/a*.py', weight: 3}}, b: {{path: '{corpus}/b*.py'}}}}",
        f"eval.sets={{c: {{path: '{corpus}/c[a-m]*.py'}}}}",
        *["eval.every_steps=2", "eval.limit=10", "train.val_every=2", "train.val_sequences=9"],
        *[f"train.max_steps={STEPS}", "sample.tokens=4", "sample.at=[1,2]", "sample.prompts=[a]"],
    ]
    prepared = [*overrides, *asked, f"eval.tasks=[{named}]"]
    first = runs.start(root / "pp1", 1, *prepared, "train.max_steps=2", "eval.every_steps=null", "eval.tasks=[]")
    assert first.wait(240) == [0], (root / "pp1" / "rank0.log").read_text()[-4000:]
    gone = [*overrides, *asked, f"eval.tasks=[{named},{root}/gone.jsonl]"]
    started = {}
    for name, number in LAYOUTS.items():
        cut = [] if name == "pp1" else [f"parallel.{name[:2]}={number}"]
        given, environment = (gone, {RESTART: "1"}) if name == "pp2" else (prepared, {})
        started[name] = runs.start(root / name, number, *given, *cut, **environment)
    for name, ranks in started.items():
        codes = ranks.wait(240)
        assert codes == [0] * LAYOUTS[name], (root / name / "rank0.log").read_text()[-4000:]
    return SimpleNamespace(root=root, records={name: runs.metrics(root / name) for name in LAYOUTS})


def leaves(value, before=()):
    """Every figure of a record by its way there."""
    if isinstance(value, dict):
        return {k: v for name, one in value.items() for k, v in leaves(one, (*before, name)).items()}
    return {before: value}


def found_after(record):
    return leaves({key: record[key] for key in ("val_loss", "val_bits_per_byte", "val_sets", "tasks") if key in record})


def test_scores_and_losses_are_those_of_every_layout(evaluated):
    last = {name: found_after(records[-1]) for name, records in evaluated.records.items()}
    one = last["pp1"]
    assert {key[1] for key in one if key[0] == "val_sets"} == {"a", "b", "c"}
    assert {key[1] for key in one if key[0] == "tasks"} == {"words", "sky", "continuation"}
    for name in LAYOUTS:
        assert last[name] == pytest.approx(one, rel=1e-5), name
        again = found_after(evaluated.records[name][1])
        assert again.keys() == one.keys() or name == "pp1"
        assert again["val_loss",] > one["val_loss",]


def test_sources_together_are_the_mixture(evaluated):
    record = evaluated.records["pp4"][-1]
    a, b = (record["val_sets"][name]["loss"] for name in "ab")
    assert record["val_loss"] == pytest.approx((7 * a + 2 * b) / 9)  # of 9 sequences every fourth is of b


def test_it_goes_on_with_other_tasks_after_a_restart(evaluated):
    records = evaluated.records["pp1"]
    assert [record["step"] for record in records] == [1, 2, 3]
    assert "tasks" not in records[0] | records[1] and "tasks" in records[2]
    assert [set(record) & {"val_loss", "eval_seconds"} for record in records] == [
        set(), {"val_loss", "eval_seconds"}, {"val_loss", "eval_seconds"}
    ]  # fmt: skip


def test_text_is_kept_with_its_step_and_not_twice(evaluated):
    for name in LAYOUTS:
        samples = [json.loads(line) for line in (evaluated.root / name / "samples.jsonl").read_text().splitlines()]
        # The run of one process ended at step 2 as well, and sampled then; its first step is not taken again.
        assert [(one["step"], one["prompt"]) for one in samples] == [(1, "a"), (2, "a"), (3, "a")]
        assert all(one["text"].startswith("a") for one in samples)


def test_a_task_that_fails_costs_no_step(evaluated):
    records, log = evaluated.records["pp2"], (evaluated.root / "pp2" / "rank0.log").read_text()
    assert [record["step"] for record in records] == [1, 2, 3]
    assert [record.get("failed_tasks") for record in records] == [None, 2, 3]  # as it was opened, and twice asked
    assert log.count("task gone has failed") == 3 and "training goes on, and it is tried again" in log
    summary = json.loads((evaluated.root / "pp2" / "summary.json").read_text())
    assert summary["complete"] and summary["evaluation"]["failed"] == {"gone": 3}
    assert "tasks have failed 3 times" in log and "s per hour of training" in log
    assert summary["tasks"] == records[-1]["tasks"]


@pytest.mark.launch
def test_the_command_has_the_same_numbers(evaluated, capsys, tmp_path):
    expected = found_after(evaluated.records["dp2"][-1])
    assert main(["eval", str(evaluated.root / "dp2"), "--json"]) == 0
    assert found_after(json.loads(capsys.readouterr().out)) == pytest.approx(expected, rel=1e-5)
    given = ["eval", str(evaluated.root / "dp2"), "--pp", "2", "--tp", "2", "--out", str(tmp_path / "found.json")]
    ranks = nursery().start("launch.cli", 4, given, tmp_path)
    assert ranks.wait(120) == [0] * 4, (tmp_path / "rank0.log").read_text()
    assert found_after(json.loads((tmp_path / "found.json").read_text())) == pytest.approx(expected, rel=1e-5)
    assert not any((tmp_path / f"rank{rank}.log").read_text() for rank in range(1, 4))


def test_what_cannot_be_measured_is_said_at_once(evaluated, capsys, tmp_path):
    run = str(evaluated.root / "pp1")
    asked = ["--tasks", "nothing", "--sets", "d", "--sets", f"e={tmp_path}/e", "--limit", "0", "--pp", "9"]
    assert main(["eval", run, *asked]) == 2
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        *["--pp=9", "--limit=0", "--tasks=nothing", "--sets=d", f"--sets.e.path={tmp_path}/e"],
    ]
    assert main(["eval", run, "--tasks", "{path: [}"]) == 2
    assert "cannot be read; {path: FILE} would work" in capsys.readouterr().err


def test_weights_from_elsewhere_are_measured_on_what_is_named(evaluated, corpus, capsys, monkeypatch, tmp_path):
    """An exported model: no run is known of it, and text stands behind whatever its tokenizer puts there, nothing."""
    monkeypatch.setenv("DEEPNARROW_CACHE", str(tmp_path / "cache"))
    exported = str(tmp_path / "exported")
    assert main(["export", str(evaluated.root / "pp1"), exported]) == 0
    capsys.readouterr()
    assert main(["eval", exported]) == 2
    assert "says nothing that is to be measured; --tasks or --sets would" in capsys.readouterr().err
    assert main(["eval", exported, "--tasks", "continuation"]) == 2
    assert "made of the held-out documents of a run" in capsys.readouterr().err
    words = str(evaluated.root / "words.jsonl")
    given = ["--tasks", words, "--sets", f"c={{path: '{corpus}/c[a-m]*.py', source: files}}", "--json"]
    assert main(["eval", exported, *given]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["eval", str(evaluated.root / "pp1"), *given]) == 0
    of_run = json.loads(capsys.readouterr().out)
    assert found["tasks"]["words"] != of_run["tasks"]["words"]
    # All of the text, in longer sequences whose documents see each other, and not the run's nine sequences.
    mine, other = found["val_sets"]["c"], of_run["val_sets"]["c"]
    assert mine != other and mine["loss"] == pytest.approx(other["loss"], rel=0.02) and found["step"] is None
