"""The cluster's command, run for real: DeepSpeed's launcher, two stages, a run folder."""

import gzip
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from launch.cli import main
from parallel import heartbeat, rendezvous
from parallel.processes import free_port
from parallel.schedules import Placement, Schedule, orders
from tests.launch.wandb_parts import history_and_config
from tests.ranks import ROOT, nursery
from tests.shapes import preset
from tests.train.checkpoint.runs import metrics
from train import pretrain
from train.names import GROUPED, grouped
from train.timeline import MeasuredStep

PRETRAIN = str(ROOT / "train" / "pretrain.py")
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))


def run(*command, **environment):
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


WATCHED = ["train.val_every=4", "sample.tokens=8", "train.max_steps=6", "data.document_separator='='"]
WATCHED += ["data.packing=best_fit"]


PIPELINED = {"bubble", "bubble_expected", "optimizer_seconds"} | {
    f"{w}_seconds" for w in ("forward", "backward", "weight", "wait")
}


def launcher(num, *arguments, **environment):
    """The plain command, --local_rank and all."""
    return run(
        DEEPSPEED, "--num_gpus", str(num), "--master_port", str(free_port()), PRETRAIN, *arguments, **environment
    )


def asked(folder, *arguments):
    """The exit code of one process with these arguments, and what it says."""
    (code,) = nursery().start("train.pretrain", 1, arguments, folder).wait(120)
    return code, (folder / "rank0.log").read_text()


def nested(spans):
    """Whether of two spans of a thread one holds the other, if they overlap: else Perfetto drops one."""
    under_way = {}
    for span in sorted(spans, key=lambda span: (span["ts"], -span["dur"])):
        outer = under_way.setdefault((span["pid"], span["tid"]), [])
        while outer and outer[-1] <= span["ts"]:
            outer.pop()
        outer.append(span["ts"] + span["dur"])
        if outer != sorted(outer, reverse=True):
            return False
    return True


@pytest.fixture(scope="module")
def pipelined(overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    # A name that changes by the microsecond: there must be one folder all the same.
    named = f"hydra.run.dir={folder}/${{now:%f}}"
    schedule = ["parallel.pp=2", "parallel.schedule=zbv", "train.timeline_at=[2,5]"]
    schedule += ["train.profile=[3]", "train.profile_ranks=[0,1]"]
    result = launcher(2, *overrides, *WATCHED, *schedule, named)
    assert result.returncode == 0, result.stderr[-4000:]
    (folder,) = folder.iterdir()
    return folder, result


@pytest.mark.launch
def test_every_step_is_one_object(pipelined, overrides):
    folder, _ = pipelined
    records, shape = metrics(folder), preset("tiny", *(one for one in overrides if one.startswith("model."))).model
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    # Sequences are a piece of a long document, or several that do not see each other.
    flops = [record["flops_per_token"] for record in records]
    assert shape.flops_per_token(1) < min(flops) < max(flops) <= shape.flops_per_token(32)
    for record in records:
        assert {"step", "loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_second"} <= set(record)
        assert record["tokens"] == record["step"] * 8 * 32
        assert len(record["memory_gib"]) == 2 and min(record["memory_gib"]) > 0
        passes = [record[f"{what}_seconds"] for what in ("forward", "backward", "weight", "wait")]
        whole = [sum(of_rank) for of_rank in zip(*passes, strict=True)]
        assert whole[0] == pytest.approx(whole[1]) and whole[0] + record["optimizer_seconds"] == pytest.approx(
            record["seconds"]
        )
        assert record["bubble"] == pytest.approx(sum(passes[3]) / sum(whole)) and 0 < record["bubble"] < 1
        assert 0 < record["bubble_expected"] < 0.3
    assert [record["step"] for record in records if "val_loss" in record] == [4, 6]
    assert records[0]["lr"] == pytest.approx(3e-3 / 10) and records[5]["lr"] == pytest.approx(6 * 3e-3 / 10)


@pytest.mark.launch
def test_the_run_folder_is_complete_and_written_by_one_rank(pipelined):
    folder, result = pipelined
    names = {path.name for path in folder.iterdir()}
    assert {".hydra", "metrics.jsonl", "summary.json", "pretrain.log", "wandb"} <= names
    note = json.loads((folder / "started.json").read_text())
    assert (note["steps"], note["resumed"], note["world_size"], note["layout"]["pp"]) == (6, None, 2, 2)
    assert note["tokens"] == metrics(folder)[-1]["tokens"] and note["ended"]["reason"] is None
    assert not (folder / "earlier").exists()
    overrides_yaml = (folder / ".hydra" / "overrides.yaml").read_text()
    assert "parallel.pp=2" in overrides_yaml and "local_rank" not in overrides_yaml
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 1
    summary = json.loads((folder / "summary.json").read_text())
    records = metrics(folder)
    assert summary["loss_last"] == records[-1]["loss"] and summary["val_loss"] == records[-1]["val_loss"]
    for said in (
        "wandb leet",
        "wandb sync",
        str(folder),
        "sample 3",
        "head  ",
        "rank",
        "best-fit packing: ",
        "documents one after another (",
    ):
        assert result.stderr.count(said) >= 1, said
    assert result.stderr.count("speed   ") == 1
    logged = re.findall(r"^\[[-\d]{10} [\d:,]+\]\[([\w.]+)\]", (folder / "pretrain.log").read_text(), re.MULTILINE)
    assert {name.partition(".")[0] for name in logged} == {"train"}  # no compiler's command, no library's news


@pytest.mark.launch
def test_the_wandb_run_holds_the_curve_the_configuration_and_the_samples(pipelined):
    folder, _ = pipelined
    history, config = history_and_config(next((folder / "wandb").glob("offline-run-*/*.wandb")))
    steps = [logged for logged in history if "train/loss" in logged]
    for logged, record in zip(steps, metrics(folder), strict=True):
        assert grouped(record).items() <= logged.items()
        assert set(record) <= set(GROUPED), "figures without a name in W&B"
    assert sum(any(key.startswith("pipeline/timeline") for key in logged) for logged in history) == 2
    assert sum(any(key.startswith("samples") for key in logged) for logged in history) == 1
    assert config["model"]["n_kv_heads"] == 2 and config["layout"]["pp"] == 2 and config["code"]


@pytest.mark.launch
def test_the_timeline_of_a_step_is_kept_and_drawn(pipelined, tmp_path, capsys):
    folder, _ = pipelined
    names = sorted(path.name for path in (folder / "timelines").iterdir())
    assert names == [f"step-0000000{step}.{kind}" for step in (2, 5) for kind in ("json", "png")]
    measured = MeasuredStep.from_json(json.loads((folder / "timelines" / "step-00000005.json").read_text()))
    done = [[span.action for span in rank] for rank in measured.spans]
    assert done == orders(Schedule["zbv"], Placement(2, 2, True), 4)
    for rank in measured.spans:
        assert all(one.end <= two.start + 1e-9 for one, two in pairwise(rank))
    # the one by each rank's clock, the other by a common one
    assert metrics(folder)[4]["bubble"] == pytest.approx(measured.bubble, abs=0.1)
    assert main(["timeline", str(folder), "--step", "2", "--out", str(tmp_path / "a.svg")]) == 0
    assert "step 2, zbv, 4 micro-batches on 2 ranks: bubble " in capsys.readouterr().out
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert main(["timeline", str(folder), "--step", "3"]) == 2
    assert capsys.readouterr().err == "--step=3: not kept; there are 2, 5\n"
    assert main(["timeline", str(folder), "--out", "a.gif"]) == 2
    assert "--out=a.gif: its end says what is drawn; a.svg or .png would work" in capsys.readouterr().err
    assert main(["timeline", str(tmp_path)]) == 2
    assert "no timeline is there; a run with parallel.pp above 1" in capsys.readouterr().err


@pytest.mark.launch
def test_chosen_ranks_keep_a_trace_of_a_chosen_step(pipelined):
    folder, result = pipelined
    paths = sorted((folder / "profiles").iterdir())
    assert [path.name for path in paths] == [f"step-00000003-rank-{rank}.json.gz" for rank in (0, 1)]
    for rank, (path, order) in enumerate(zip(paths, orders(Schedule["zbv"], Placement(2, 2, True), 4), strict=True)):
        with gzip.open(path, "rt") as file:
            events = json.load(file)["traceEvents"]
        spans = [event for event in events if event.get("cat") == "user_annotation"]
        passes = sorted(
            (e for e in spans if e["name"][:8] in ("F stage ", "B stage ", "W stage ")), key=lambda e: e["ts"]
        )
        assert [event["name"] for event in passes] == [
            f"{action.what.name} stage {action.stage} micro-batch {action.micro_batch}" for action in order
        ]
        assert nested([event for event in events if event["ph"] == "X"])
        before = (2, 0)[rank]  # stages 0 and 3 are the first rank's, 1 and 2 the second's
        assert f"wait for F stage {before} micro-batch 0" in {event["name"] for event in spans}
    assert result.stderr.count(f"profile of step 3 on rank 0: {paths[0]}") == 1
    assert "on rank 1" not in result.stderr
    untraced = [record["seconds"] for record in metrics(folder) if record["step"] not in (1, 3)]
    speed = json.loads((folder / "summary.json").read_text())["tokens_per_second"]
    assert speed == pytest.approx(len(untraced) * 8 * 32 / sum(untraced))


@pytest.mark.launch
def test_one_process_has_the_same_curve_and_an_earlier_run_is_kept(pipelined, overrides, tmp_path, tmp_path_factory):
    folder, _ = pipelined
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    code, said = asked(tmp_path_factory.mktemp("said"), *overrides, *WATCHED, f"hydra.run.dir={tmp_path}")
    assert code == 0, said[-4000:]
    for one, two in zip(metrics(tmp_path), metrics(folder), strict=True):
        assert one.keys() == {key for key in two if key not in PIPELINED}
        for key in {"loss", "grad_norm", "val_loss"} & one.keys():
            assert one[key] == pytest.approx(two[key], rel=1e-5), (one["step"], key)
    assert (tmp_path / "earlier" / "1" / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.launch
def test_impossible_settings_are_said_once_under_the_launcher(overrides, tmp_path):
    folder = tmp_path / "run"
    result = launcher(
        2, *overrides, "parallel.pp=2", "model.n_kv_heads=3", "train.global_batch=9", f"hydra.run.dir={folder}"
    )
    assert result.returncode == 2
    assert result.stderr.count("model.n_kv_heads=3: ") == 1
    assert result.stderr.count("train.global_batch=9: ") == 1
    assert "Traceback" not in result.stderr
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cfg", "job", "--resolve", "model=67b", "--local_rank=3"], ["n_layers: 95", "name: 67b-stdlib-"]),
        (["--help"], ["deepspeed train/pretrain.py model=67b", "== Configuration groups ==", "model: 12x768"]),
        (["--cfg", "hydra"], ["dir: runs/"]),
    ],
)
def test_hydras_questions_are_answered(arguments, said, tmp_path):
    code, text = asked(tmp_path, *arguments)
    assert code == 0 and all(part in text for part in said), text


def test_a_rank_that_meets_no_other_says_that_it_has_not_failed_by_itself(tmp_path, monkeypatch):
    """So a run is started again whose ranks came too late, even before its first step."""

    def alone():
        raise rendezvous.RankLost("rank 0 was not met")

    monkeypatch.setattr(rendezvous, "join", alone)
    monkeypatch.setattr(pretrain, "heart", heartbeat.Heart())
    monkeypatch.setattr(pretrain, "stand_alone_unless_launched", lambda: None)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(heartbeat.FOLDER, str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        pretrain.main([])
    said = heartbeat.failed(tmp_path, 1)
    assert ended.value.code == 1 and (said["reason"], said["by_itself"]) == ("rank 0 was not met", False)


def test_an_unknown_option_is_refused(tmp_path):
    code, text = asked(tmp_path, "--multirun", "train.seed=1,2")
    assert code == 2 and "--multirun" in text and "Traceback" not in text
