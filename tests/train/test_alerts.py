"""Alerts and what they are made of, with programs of this machine as the command that is told."""

import json
import shutil
import time
from collections import namedtuple

import psutil
import pytest

from conf.alert_settings import AlertLevel, AlertsConfig, command_of
from conf.alert_settings import problems as settings_problems
from launch.cli import main
from tests.shapes import preset
from train.alerts import Alerts, DiskWatch, SkipWatch, problems
from train.checkpoint.saver import Outcome
from train.events import EVENTS
from train.tracking import Tracker

WARN, ERROR, INFO = AlertLevel.warn, AlertLevel.error, AlertLevel.info
WRITES = "cat >> {0}/told; echo >> {0}/told; env | grep ^DEEPNARROW_ALERT_ | sort > {0}/variables"


@pytest.fixture
def made(tmp_path):
    """From settings to alerts, with what is written to events.jsonl and said."""

    def make(command, clock=time.monotonic, **settings):
        events, said = [], []
        config = AlertsConfig(command=command, **settings)
        alerts = Alerts(config, tmp_path / "run", events.append, lambda text, level: said.append(text), clock)
        return alerts, events, said

    return make


def by_shell(script):
    return ["sh", "-c", script]


def told(folder):
    path = folder / "told"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_the_command_gets_an_alert_as_json_and_as_variables(made, tmp_path):
    alerts, events, said = made(by_shell(WRITES.format(tmp_path)))
    assert alerts.send("diverged", 'step 7: "it" is\nnot finite é', ERROR, 7)
    alerts.close()
    (alert,) = told(tmp_path)
    alert.pop("time"), alert.pop("host")
    assert alert == {
        **{"title": "diverged", "text": 'step 7: "it" is\nnot finite é', "level": "error", "step": 7},
        **{"run": "run", "run_dir": str(tmp_path / "run")},
    }
    variables = dict(line.split("=", 1) for line in (tmp_path / "variables").read_text().splitlines())
    assert variables["DEEPNARROW_ALERT_TITLE"] == "diverged" and variables["DEEPNARROW_ALERT_STEP"] == "7"
    assert variables["DEEPNARROW_ALERT_LEVEL"] == "error" and variables["DEEPNARROW_ALERT_RUN"] == "run"
    assert not said and [(event["event"], event["title"]) for event in events] == [("alert", "diverged")]


def test_an_alert_does_not_wait_for_the_command_and_the_end_does(made, tmp_path):
    alerts, _, said = made(by_shell(f"while ! [ -e {tmp_path}/go ]; do sleep 0.05; done; {WRITES.format(tmp_path)}"))
    for title in ("a", "b"):
        assert alerts.send(title, "x", ERROR, 1)
    assert not told(tmp_path)
    (tmp_path / "go").touch()
    alerts.close()
    assert [alert["title"] for alert in told(tmp_path)] == ["a", "b"] and not said


def ended(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_program_that_hangs_is_killed_with_what_it_has_started_and_the_next_is_run(made, tmp_path):
    hangs = f"if mkdir {tmp_path}/first; then sleep 600 & echo $! $$ > {tmp_path}/pids; wait; fi; touch {tmp_path}/next"
    alerts, _, said = made(by_shell(hangs), timeout_seconds=2.0)
    alerts.send("a", "", ERROR, 1)
    while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text().endswith("\n"):
        time.sleep(0.01)
    child, shell = map(int, (tmp_path / "pids").read_text().split())
    alerts.send("b", "", ERROR, 1)
    while not (tmp_path / "next").exists():
        time.sleep(0.01)
    alerts.close()
    assert ended(child) and not psutil.pid_exists(shell)
    (line,) = said
    assert line.startswith("alerts.command was killed: it has not ended within 2 s (alerts.timeout_seconds), for the")


def test_the_end_kills_what_hangs_and_counts_the_alerts_that_were_not_sent(made):
    alerts, _, said = made(["sleep", "600"], timeout_seconds=0.5)
    for title in ("a", "b", "c"):
        alerts.send(title, "", ERROR, 1)
    alerts.close()
    assert any("alerts.command was not run for " in line for line in said), said
    assert not [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]


def test_a_program_that_fails_is_said_once_with_its_last_line(made):
    alerts, events, said = made(by_shell("cat > /dev/null; echo first >&2; echo the hook is closed >&2; exit 3"))
    for title in ("a", "b"):
        alerts.send(title, "", ERROR, 1)
    alerts.close()
    more = "; further failures are counted, and not said before the end"
    assert said == [
        f"alerts.command ended with exit code 3 (the hook is closed), for the alert 'a'{more}",
        "alerts.command has failed 2 times",
    ]
    assert len(events) == 2


@pytest.mark.parametrize(
    ("command", "failure"),
    [
        (["true"], None),  # reads nothing of more than a pipe holds
        (by_shell("yes | head -c 1000000 >&2"), None),
        (by_shell("kill -9 $$"), "was ended by signal 9"),
        (by_shell("sleep 10 >&2 & echo gone >&2; exit 1"), "ended with exit code 1 (gone)"),
        (["/no/such/program"], "could not be started ("),
    ],
    ids=["silent", "loud", "killed", "a child that stays", "not there"],
)
def test_programs_of_all_kinds(made, command, failure):
    alerts, _, said = made(command, timeout_seconds=5.0)
    alerts.send("a", "x" * 200_000 if command == ["true"] else "", ERROR, 1)
    alerts.close()
    assert [line.startswith(f"alerts.command {failure}") for line in said] == ([True] if failure else []), said


def test_alerts_of_a_kind_are_limited_counted_and_all_in_the_run_folder(made, tmp_path):
    now = 0.0
    alerts, events, _ = made(by_shell(WRITES.format(tmp_path)), lambda: now, every_minutes=10.0)
    sent = [alerts.send(title, "x", WARN, 1) for title in ("a", "a", "b", "a")]
    now = 601.0
    sent.append(alerts.send("a", "x", WARN, 1))
    alerts.close()
    assert sent == ["x", None, "x", None, "x (2 more of the kind since the last alert)"]
    assert [alert["text"] for alert in told(tmp_path)] == [one for one in sent if one] and len(events) == 5


def test_levels_that_are_not_asked_for_are_in_the_run_folder_alone(made, tmp_path):
    alerts, events, _ = made(by_shell(WRITES.format(tmp_path)), levels=[ERROR])
    assert [alerts.send("a", "", level, 1) for level in (INFO, WARN, ERROR)] == [None, None, ""]
    alerts.close()
    assert [alert["level"] for alert in told(tmp_path)] == ["error"] and len(events) == 3
    assert AlertsConfig().levels == [WARN, ERROR]


def test_steps_that_are_skipped_in_a_row_or_too_often():
    watch = SkipWatch(AlertsConfig(skipped_in_a_row=3, skipped_percent=None))
    said = [watch.news(one == "x") for one in "x.xx.xxxxx"]
    assert [index for index, news in enumerate(said) if news] == [7]  # once for each row
    assert said[7] == "3 updates in a row were skipped (alerts.skipped_in_a_row)"
    watch = SkipWatch(AlertsConfig(skipped_in_a_row=None, skipped_percent=2.0))
    said = [watch.news(number % 40 == 0) for number in range(200)]
    assert [index for index, news in enumerate(said) if news] == [80, 120, 160]  # a third within a hundred
    assert said[80] == "3 of the last 81 updates were skipped (alerts.skipped_percent)"
    watch = SkipWatch(AlertsConfig(skipped_in_a_row=None, skipped_percent=None))
    assert not any(watch.news(True) for _ in range(200))


@pytest.fixture
def disk(monkeypatch):
    """Free GiB, as the system says."""
    free = [10.0]
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(int(free[0] * 2**30)))
    return free


def test_a_disk_with_less_room_than_checkpoints_need(disk, tmp_path):
    now = [0.0]
    watch = DiskWatch(AlertsConfig(), tmp_path, lambda: 2, 4 * 2**30, lambda: now[0])

    def later():
        now[0] += 61.0
        return watch.news()

    assert later() is None
    disk[0] = 7.5
    needed = "7.50 GiB are free, and 8.00 are needed (for the next 2 checkpoints of 4.00 GiB)"
    assert later() == f"{tmp_path}: {needed}"
    assert later() is None  # once
    disk[0] = 9.0
    assert later() is None
    watch.size = 5 * 2**30
    assert "10.00 are needed" in later()
    disk[0] = 1.0
    assert DiskWatch(AlertsConfig(disk_free_gib=2.0), tmp_path, lambda: 0, 0).news().endswith("(alerts.disk_free_gib)")
    assert DiskWatch(AlertsConfig(), tmp_path, lambda: 0, 9, lambda: now[0]).news() is None


RECORD = {"step": 1, "tokens": 8, "loss": 1.0, "grad_norm": 1.0, "lr": 0.1, "seconds": 1.0, "tokens_per_second": 8.0}


def test_a_run_looks_at_its_disk_and_alerts_of_a_save_that_fails(disk, tmp_path):
    config = preset("tiny", "wandb.mode=disabled", f"alerts.command=['tee','-a','{tmp_path}/told']")
    now, disk[0] = [0.0], 1.0
    tracker = Tracker(config, tmp_path, steps=9, facts={}, clock=lambda: now[0])
    tracker.step(RECORD)
    assert not (tmp_path / EVENTS).exists()  # a model of the test's size has room
    tracker.saved(Outcome(1, tmp_path, 0.0, 0.0, 2**30, None))
    tracker.saved(Outcome(2, tmp_path, 0.0, 0.0, 0, "OSError on rank 1: no space"))
    now[0] = 61.0
    tracker.step(RECORD)
    tracker.finish({"complete": True})
    alerts = [json.loads(line) for line in (tmp_path / EVENTS).read_text().splitlines()]
    assert [(alert["title"], alert["level"]) for alert in alerts] == [
        ("checkpoint not saved", "error"),
        ("disk nearly full", "warn"),
    ]
    assert "4.00 are needed (for the next 4 checkpoints of 1.00 GiB)" in alerts[1]["text"]
    written = (tmp_path / "told").read_text()
    assert '"checkpoint not saved"' in written and '"disk nearly full"' in written


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("alerts.command='curl \"x'", 'alerts.command=curl "x: no closing quotation; '),
        ("alerts.command=[]", "alerts.command=[]: names no program; "),
        ("alerts.command={a: 1}", "alerts.command={'a': 1}: is neither a text nor a list of texts; "),
        ("alerts.timeout_seconds=0", "alerts.timeout_seconds=0.0: not a time above 0; 30 would work"),
        ("alerts.every_minutes=-1", "alerts.every_minutes=-1.0: not a time from 0 up; 10 would work"),
        ("alerts.skipped_in_a_row=0", "alerts.skipped_in_a_row=0: at least 1, or null"),
        ("alerts.skipped_percent=101", "alerts.skipped_percent=101.0: a percentage from 0 to 100"),
        ("alerts.disk_free_gib=-1", "alerts.disk_free_gib=-1.0: a size from 0 up"),
    ],
)
def test_settings_that_cannot_be_are_said(override, said):
    (problem,) = settings_problems(preset("tiny", override).alerts)
    assert problem.startswith(said) and "would work" in problem


def test_a_command_is_a_list_or_a_text_that_is_split_as_a_shell_does():
    assert command_of(preset("tiny", "alerts.command='notify --to \"me and you\" $HOME'").alerts) == [
        *["notify", "--to", "me and you", "$HOME"]
    ]
    assert command_of(preset("tiny", "alerts.command=[sh,-c,'curl x | tee y',7]").alerts)[2:] == ["curl x | tee y", "7"]
    assert command_of(AlertsConfig()) == [] and not problems(AlertsConfig())


def test_a_program_that_is_not_there_is_refused_before_anything_is_started(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hook").touch()
    for program, why in (("no-such-program", "is not there"), ("./hook", "is no program that can be run")):
        assert main(["train", f"alerts.command=[{program},--urgent]", "optimizer.lr=-1"]) == 2
        first, second = sorted(capsys.readouterr().err.splitlines())
        assert first.startswith(f"alerts.command=['{program}', '--urgent']: {program} {why} on ")
        assert first.endswith("; the path of one that is, or null, would work") and second.startswith("optimizer.lr")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "hook").chmod(0o755)
    assert not problems(AlertsConfig(command=[str(tmp_path / "hook")]))
