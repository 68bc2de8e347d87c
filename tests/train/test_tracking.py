import json
import math
import os
import resource
import sys
from urllib.parse import urlparse

import wandb

from conf.train_settings import WandbConfig, WandbMode
from tests.shapes import preset
from train.checkpoint.saver import Outcome
from train.events import EVENTS
from train.metrics import PEAK_BF16_FLOPS, peak_flops, peak_memory
from train.records import METRICS, SUMMARY, cut, set_aside
from train.spikes import SKIPPED, SkippedStep
from train.tracking import Tracker
from train.wandb_run import wandb_mode


def test_wandb_is_offline_without_a_key_and_online_with_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(variable, raising=False)
    assert wandb_mode(WandbConfig()) == "offline"
    assert wandb_mode(WandbConfig(mode=WandbMode.online)) == "online"
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    netrc.chmod(0o600)
    assert wandb_mode(WandbConfig()) == "online"
    # where this version's `wandb login` writes
    netrc.write_text(f"machine {urlparse(wandb.Settings().base_url).hostname} login user password secret\n")
    assert wandb_mode(WandbConfig()) == "online"
    netrc.rename(tmp_path / "elsewhere")
    assert wandb_mode(WandbConfig()) == "offline"
    monkeypatch.setenv("NETRC", str(tmp_path / "elsewhere"))
    assert wandb_mode(WandbConfig()) == "online"
    monkeypatch.delenv("NETRC")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode(WandbConfig()) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(WandbConfig()) == "disabled"
    assert wandb_mode(WandbConfig(mode=WandbMode.offline)) == "offline"
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert wandb_mode(WandbConfig()) == "offline"
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    assert wandb_mode(WandbConfig()) == "online"


def test_a_run_without_a_server_or_key_is_logged_offline(monkeypatch, tmp_path, caplog):
    def init(*, mode, settings, **run):
        asked.append((mode, os.environ["WANDB_MODE"]))
        assert settings.init_timeout <= 30
        if mode == "online":
            raise wandb.errors.CommError("no such host\nand more")
        return Online(0)

    asked = []
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    monkeypatch.setattr(wandb, "init", init)
    config = preset("tiny", "wandb.mode=online")
    tracker = Tracker(config, tmp_path, steps=1, facts={})
    assert tracker.wandb.mode == "offline" and asked == [("online", "online"), ("offline", "offline")]
    assert "no such host" in caplog.text and "and more" not in caplog.text
    assert os.environ["WANDB_MODE"] == "no such mode", "it is the user's, for what else this process does with W&B"


class Online:
    """A run on W&B's server."""

    id, url, dir = "abc", "somewhere", "wandb/run-abc/files"

    def __init__(self, starting_step):
        self.starting_step, self.steps, self.fails = starting_step, [], False

    def define_metric(self, name, **how):
        pass

    def log(self, values, step, commit):
        if self.fails:
            raise ConnectionResetError("gone")
        assert values["step"] == step and commit
        self.steps.append(step)


def record(step):
    figures = {"loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "seconds": 1.0, "tokens_per_second": 1.0}
    return {"step": step, "tokens": 8 * step, **figures}


def told(tracker):
    """Once W&B has been told all."""
    assert tracker.wandb.wait(20.0)
    return True


def test_a_run_that_goes_on_leaves_no_gap_and_repeats_no_step(monkeypatch, tmp_path):
    lines = [json.dumps(record(step)) + "\n" for step in range(1, 10)]
    (tmp_path / METRICS).write_text("".join(lines) + '{"step": 10, "lo')
    (tmp_path / SUMMARY).write_text("{}")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "id").write_text("abc\n")
    run, asked = Online(starting_step=6), []  # it was killed before W&B had step 6
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "init", lambda **given: asked.append(given) or run)
    tracker = Tracker(preset("tiny"), tmp_path, steps=20, facts={}, resumed=8)
    assert asked[0]["id"] == "abc" and asked[0]["resume"] == "allow"
    assert not (tmp_path / SUMMARY).exists()
    tracker.step(record(9))
    assert told(tracker) and run.steps == [6, 7, 8, 9]
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS).read_text().splitlines()] == list(range(1, 10))
    # W&B was ahead of the checkpoint
    ahead = Online(starting_step=12)
    monkeypatch.setattr(wandb, "init", lambda **given: ahead)
    tracker = Tracker(preset("tiny"), tmp_path, steps=20, facts={}, resumed=9)
    for step in (10, 11, 12):
        tracker.step(record(step))
    assert told(tracker) and ahead.steps == [12]


def test_figures_of_stages_and_of_sources_have_a_curve_each(monkeypatch, tmp_path):
    class Curves(Online):
        def log(self, values, **how):
            curves.update(values)

    curves = {}
    monkeypatch.setattr(wandb, "init", lambda **given: Curves(0))
    tracker = Tracker(preset("tiny", "wandb.mode=online"), tmp_path, steps=1, facts={})
    tracker.step(record(1) | {"memory_gib": [1.0, 2.0], "source_tokens": {"web": 5, "code": 3}})
    assert told(tracker)
    assert (curves["memory/stage1"], curves["data/web/tokens"], curves["data/code/tokens"]) == (2.0, 5, 3)
    assert curves["train/loss"] == 1.0 and not {"source_tokens", "memory_gib", "loss"} & set(curves)
    (line,) = (tmp_path / METRICS).read_text().splitlines()
    assert json.loads(line)["source_tokens"] == {"web": 5, "code": 3}


def test_a_run_that_began_offline_stays_offline(monkeypatch, tmp_path, caplog):
    part = tmp_path / "wandb" / "offline-run-20260101_000000-abc"
    part.mkdir(parents=True)
    (tmp_path / "wandb" / "run-id").write_text("abc\n")
    (part / "run-abc.wandb").write_bytes(b"")
    modes = []
    monkeypatch.setattr(wandb, "init", lambda **given: modes.append(given["mode"]) or Online(0))
    monkeypatch.setenv("WANDB_MODE", "online")
    assert Tracker(preset("tiny"), tmp_path, steps=1, facts={}).wandb.mode == "offline" and modes == ["offline"]


def test_the_end_of_wandbs_process_is_not_the_runs(monkeypatch, tmp_path, caplog):
    run = Online(0)
    monkeypatch.setattr(wandb, "init", lambda **given: run)
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    tracker = Tracker(preset("tiny", "wandb.mode=online"), tmp_path, steps=3, facts={})
    run.fails = True
    with caplog.at_level("INFO"):
        for step in (1, 2):
            tracker.step(record(step))
    tracker.finish({"complete": True})
    assert caplog.text.count("W&B has ended (gone)") == 1
    assert len((tmp_path / METRICS).read_text().splitlines()) == 2 and (tmp_path / SUMMARY).exists()


def test_a_save_is_told_of_and_its_cost_stands_with_the_next_step(monkeypatch, tmp_path, caplog):
    tracker = Tracker(preset("tiny", "wandb.mode=disabled"), tmp_path, steps=3, facts={})
    with caplog.at_level("INFO"):
        tracker.saved(Outcome(1, tmp_path, 0.25, 1.5, 2**30, None))
        tracker.step(record(2))
        tracker.saved(Outcome(2, tmp_path, 0.25, 1.5, 0, "OSError on rank 1: no space"))
        tracker.step(record(3))
    second, third = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert second["save_blocked_seconds"] == 0.25 and second["save_seconds"] == 1.5 and second["save_gib"] == 1.0
    assert "save_seconds" not in third
    assert "step 2 could not be saved (OSError on rank 1: no space)" in caplog.text


def strictly(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def quiet_tracker(folder, *overrides, **facts):
    return Tracker(preset("tiny", "wandb.mode=disabled", *overrides), folder, facts={}, **facts)


def lost(step):
    """A step that was skipped since it was not finite."""
    nothing = dict(loss_limit=None, grad_norm_limit=None, seq_len=8, samples=[[0, 7]], places={}, sequences={})
    return SkippedStep(step, "not finite", "it is not finite", math.nan, math.inf, **nothing)


def test_skipped_steps_are_counted_said_and_written_as_json(tmp_path, caplog):
    tracker = quiet_tracker(tmp_path, steps=5)
    figures = {"loss": math.nan, "grad_norm": math.inf, "memory_gib": [1.0]}
    tracker.step(record(1))
    tracker.step(record(2) | figures, lost(2))
    tracker.step(record(3))
    tracker.step(record(4) | figures, lost(4))
    tracker.finish({"complete": True, "loss_last": tracker.last["loss"], "skipped_steps": tracker.skipped_steps})
    records = [strictly(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert records[1]["loss"] is None and records[1]["nonfinite"] == ["loss", "grad_norm"]
    assert [found.get("skipped_steps") for found in records] == [None, 1, 1, 2]
    assert "nonfinite" not in records[2] and [found.get("skipped") for found in records[:2]] == [None, "not finite"]
    listed = [strictly(line) for line in (tmp_path / SKIPPED).read_text().splitlines()]
    assert [(found["step"], found["samples"]) for found in listed] == [(2, [[0, 7]]), (4, [[0, 7]])]
    summary = strictly((tmp_path / SUMMARY).read_text())
    assert summary["loss_last"] is None and summary["nonfinite"] == ["loss_last"] and summary["skipped_steps"] == 2
    warnings = [said.message for said in caplog.records if said.levelname == "WARNING"]
    assert len(warnings) == 1 and warnings[0].startswith("step 2 was skipped: it is not finite, and")


def test_a_run_that_goes_on_goes_on_counting_skipped_steps(tmp_path):
    first = quiet_tracker(tmp_path, steps=9)
    for step in (1, 2, 3):
        first.step(record(step) | {"loss": math.nan}, lost(step) if step < 3 else None)
    second = quiet_tracker(tmp_path, steps=9, resumed=1)  # its checkpoint is older than its records
    assert second.skipped_steps == 1 and math.isnan(second.first["loss"])
    assert [strictly(line)["step"] for line in (tmp_path / SKIPPED).read_text().splitlines()] == [1]
    second.step(record(2) | {"grad_norm": math.inf}, lost(2))
    second.step(record(3))
    assert [strictly(line)["step"] for line in (tmp_path / SKIPPED).read_text().splitlines()] == [1, 2]
    records = [strictly(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [found["step"] for found in records] == [1, 2, 3]
    assert [found["skipped_steps"] for found in records] == [1, 2, 2]


def test_a_checkpoint_that_is_deleted_is_missed_and_made_up_for(tmp_path, caplog):
    asked = []
    tracker = quiet_tracker(tmp_path, steps=5, deleted=lambda: asked.append("save"))
    newest = tmp_path / "checkpoints" / "step-00000001"
    newest.mkdir(parents=True)
    tracker.saved(Outcome(1, newest, 0.0, 0.0, 1, None))
    tracker.step(record(2))
    assert not asked
    newest.rmdir()
    tracker.step(record(3))
    tracker.step(record(4))
    assert asked == ["save"] and caplog.text.count(f"{newest} was deleted or moved") == 1
    assert not tracker.finish({"complete": True})


def test_metrics_are_cut_where_a_disk_is_full(tmp_path):
    metrics = tmp_path / METRICS
    metrics.write_text("".join(json.dumps(record(step)) + "\n" for step in range(1, 9)) + '{"step": 9')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        assert [found["step"] for found in cut(metrics, 4)] == [1, 2, 3, 4]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4]


def test_wandb_gets_what_is_not_finite_as_it_is(monkeypatch, tmp_path):
    run, logged = Online(0), []
    run.log = lambda values, step, commit: logged.append(values)
    monkeypatch.setattr(wandb, "init", lambda **given: run)
    tracker = Tracker(preset("tiny", "wandb.mode=online"), tmp_path, steps=3, facts={})
    tracker.step(record(1) | {"loss": math.nan}, lost(1))
    assert told(tracker) and math.isnan(logged[0]["train/loss"]) and logged[0]["train/skipped_steps"] == 1


def test_too_many_skipped_steps_are_alerted(monkeypatch, tmp_path):
    run, alerts = Online(0), []
    run.log = lambda values, step, commit: None
    run.alert = lambda title, text, level: alerts.append((title, text, level))
    monkeypatch.setattr(wandb, "init", lambda **given: run)
    tracker = Tracker(preset("tiny", "wandb.mode=online", "alerts.skipped_in_a_row=2"), tmp_path, steps=3, facts={})
    for step in (1, 3, 4, 5, 6):
        tracker.step(record(step), lost(step) if step != 3 else None)
    assert told(tracker)
    said = "step 5: 2 updates in a row were skipped (alerts.skipped_in_a_row); the last since it is not finite"
    assert alerts == [("steps skipped", said, "WARN")]
    (event,) = [strictly(line) for line in (tmp_path / EVENTS).read_text().splitlines()]
    assert (event["event"], event["title"], event["level"], event["step"]) == ("alert", "steps skipped", "warn", 5)


def test_a_log_has_a_line_a_minute_or_by_steps(tmp_path, caplog):
    now = [0.0]
    with caplog.at_level("INFO"):
        for name, asked in (("by the minute", "null"), ("by steps", "20")):
            (tmp_path / name).mkdir()
            tracker = quiet_tracker(tmp_path / name, f"train.log_every={asked}", steps=50, clock=lambda: now[0])
            for step in range(1, 51):
                now[0] += 5.0
                tracker.step(record(step))
    lines = [said.message for said in caplog.records if said.message.startswith("step ")]
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in lines]
    assert steps == [1, 13, 25, 37, 49, 50, 1, 20, 40, 50]
    said = "step 13/50  loss 1.0000  norm 1.000  lr 1.00e-01  1 tokens/s  eta 00:03:05  138,240 tokens/day"
    assert lines[1] == said


def test_going_back_keeps_what_was_before_and_moves_what_came_after(tmp_path):
    (tmp_path / METRICS).write_text("".join(json.dumps(record(step)) + "\n" for step in range(1, 9)))
    for step in (4, 8):
        (tmp_path / "checkpoints" / f"step-0000000{step}").mkdir(parents=True)
    (tmp_path / "wandb").mkdir()
    moved = set_aside(tmp_path, after=4)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    assert [path.name for path in (moved / "checkpoints").iterdir()] == ["step-00000008"]
    assert (moved / METRICS).read_text() == (tmp_path / METRICS).read_text() and (moved / "wandb").is_dir()
    again = set_aside(tmp_path)
    assert again.name == "2" and (again / "checkpoints" / "step-00000004").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["earlier"]


def test_what_an_earlier_run_wrote_is_moved_and_the_rest_stays(tmp_path):
    assert set_aside(tmp_path) is None
    for attempt in (1, 2):
        (tmp_path / METRICS).write_text(json.dumps({"step": attempt}))
        (tmp_path / SUMMARY).write_text("{}")
        for folder in (".hydra", "timelines", "profiles"):
            (tmp_path / folder).mkdir()
        (tmp_path / "notes.txt").write_text("mine")
        moved = set_aside(tmp_path)
        assert moved == tmp_path / "earlier" / str(attempt)
        assert json.loads((moved / METRICS).read_text()) == {"step": attempt}
        assert (moved / SUMMARY).exists() and (moved / ".hydra").is_dir()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier", "notes.txt"]


def test_known_devices(monkeypatch):
    import torch

    gpu = torch.device("cuda")
    for name, peak in [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H800 PCIe", 756e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GB200", 2500e12),
        ("Some GPU", None),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(gpu) == peak, name
    assert peak_flops(torch.device("cpu")) is None
    assert min(PEAK_BF16_FLOPS.values()) > 1e13


def test_memory_on_the_cpu_is_what_the_process_holds():
    import torch

    before = peak_memory(torch.device("cpu"))
    assert 2**20 < before < 2**40


def test_a_run_that_does_not_log_there_does_not_need_wandb(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = quiet_tracker(tmp_path, steps=1)
    tracker.step(record(1))
    tracker.samples(1, ["a"], ["ab"])
    tracker.picture("timeline", tmp_path / "none.png")
    tracker.finish({"complete": True})
    assert json.loads((tmp_path / "summary.json").read_text())["wandb"] == {"mode": "disabled"}
