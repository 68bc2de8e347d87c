"""What a run may be started again after, how often and when, and what is written of it."""

import json
import signal
import time
from dataclasses import replace

import pytest

from conf.alert_settings import AlertsConfig
from conf.launch_settings import LaunchConfig, problems
from launch.persistence import Persistence, _Watch
from launch.restarts import Events, Failure, Recovery, Restarts
from launch.watchdog import HOST_LOST, Gone, remove_heartbeats
from parallel import heartbeat
from parallel.heartbeat import FOLDER, Heart, Phase
from parallel.layout import Layout
from tests.train.test_patient_file import full
from train.events import RESTART, last_failure, tell_of_restart
from train.records import SUMMARY

KILLED = Failure("was ended by SIGKILL", 1, "a", 8, "B stage 1 micro-batch 3, step 8", False, 0.2)
FAILED = replace(KILLED, cause="failed (ValueError: x)", by_itself=True)


def at(failure, step):
    return replace(failure, step=step)


def test_waits_double_as_long_as_no_step_is_gained():
    restarts = Restarts(100)
    assert [restarts.after(at(KILLED, step)) for step in (8, 8, 16, 9, 10, 11)] == [1, 2, 1, 2, 4, 8]
    many = Restarts(100)
    assert max(many.after(at(KILLED, step)) for step in range(50, 0, -1)) == 300


def test_the_budget_is_of_a_day():
    now = 0.0
    restarts = Restarts(2, lambda: now)
    assert [restarts.after(at(KILLED, step)) for step in (1, 2)] == [1, 1]
    assert restarts.after(at(KILLED, 3)) == "it has been started again 2 times within 24 hours (launch.restarts=2)"
    now = 24 * 3600 + 1
    assert restarts.after(at(KILLED, 4)) == 1 and restarts.count == 3
    assert Restarts(0).after(KILLED) == "launch.restarts=0"


def test_what_would_fail_again_is_not_tried_again():
    alike = Restarts(10)
    assert [alike.after(FAILED), alike.after(FAILED)] == [1, 2]
    assert alike.after(FAILED) == "it has failed alike 3 times at step 8"
    new = Restarts(10)
    assert new.after(at(FAILED, 0)) == "it has failed by itself before its first step, and would again"
    assert new.after(at(KILLED, 0)) == 2  # something killed it
    assert new.after(at(KILLED, 3)) == 1
    assert new.after(at(FAILED, 0)) == 2  # it has shown that it can train


def test_settings_that_cannot_be_are_said():
    assert not problems(LaunchConfig()) and not problems(LaunchConfig(0, 0.5))
    for settings, said in (
        (LaunchConfig(restarts=-1), "launch.restarts=-1: must be at least 0"),
        (LaunchConfig(stall_seconds=0.0), "launch.stall_seconds=0.0: not a time above 0"),
        (LaunchConfig(stall_seconds=float("nan")), "launch.stall_seconds=nan: "),
    ):
        (problem,) = problems(settings)
        assert problem.startswith(said)


def test_what_was_lost_is_split():
    recovery = Recovery(KILLED, noticed=100.0, loading=110.0, training=113.0)
    assert recovery.seconds(120.0) == dict(noticing=0.2, restarting=10.0, loading=3.0, recomputing=7.0, lost=20.2)


class Told:
    """A tracker that only remembers."""

    def __init__(self):
        self.lines, self.alerts, self.figures = [], [], {}

    def say(self, text):
        self.lines.append(text)

    def alert_wandb(self, title, text, level):
        self.alerts.append(title)

    def add_to_next(self, figures):
        self.figures |= figures


def test_the_next_start_hears_of_the_last_failure(tmp_path):
    events, told = Events(tmp_path), Told()
    events.failed(at(KILLED, 3), 1.0)
    events.failed(KILLED, "launch.restarts=0")
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "fai')
    assert last_failure(tmp_path)["not_restarted"] == "launch.restarts=0"
    tell_of_restart(told, tmp_path, {})
    assert not told.lines
    tell_of_restart(told, tmp_path, {RESTART: "2"})
    assert told.lines == ["restart 2, after a failure: rank 1 on a was ended by SIGKILL, step 8"]
    assert told.alerts == ["restarted"] and told.figures == {"restarts": 2}


def test_a_rank_that_has_never_been_seen_is_named_without_a_host(tmp_path):
    unseen, told = replace(KILLED, rank=2, host=None, doing="", step=0), Told()
    assert str(unseen) == "rank 2 was ended by SIGKILL"
    Events(tmp_path).failed(unseen, 1.0)
    tell_of_restart(told, tmp_path, {RESTART: "1"})
    assert told.lines == ["restart 1, after a failure: rank 2 was ended by SIGKILL, step 0"]


class Signals:
    first = fatal = None


class Starts:
    """Starts that end as they are told to, with a rank that comes to a step, or to a phase."""

    def __init__(self, *codes, reaches=8):
        self.codes, self.reaches, self.seen = iter(codes), reaches, []

    def __call__(self, arguments, environment, look):
        self.seen.append((arguments, environment.get(RESTART)))
        heart = Heart()
        heart.share(environment[FOLDER], 0)
        heart.at(self.reaches) if isinstance(self.reaches, Phase) else heart.begin_step(self.reaches)
        assert look() is False
        return next(self.codes)


def kept_going(tmp_path, starts, signals=Signals, restarts=10, alerting=None):
    alerting = alerting or AlertsConfig(["tee", "-a", str(tmp_path / "told")])
    persistence = Persistence(Layout(1, 1, 1), tmp_path, LaunchConfig(restarts), ["again"], alerting=alerting)
    return persistence.run(starts, ["first"], signals)


def alerts(folder):
    """What the command of the alerts was told."""
    if not (folder / "told").exists():
        return []
    whole = (folder / "told").read_text().replace("}{", "}\n{")
    return [json.loads(line) for line in whole.splitlines()]


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr("launch.restarts.LONGEST_WAIT", 0.0)


@pytest.mark.usefixtures("at_once")
def test_a_run_goes_on_until_it_ends_and_says_where_it_goes_on_from(tmp_path):
    starts = Starts(137, 137, 0)
    assert kept_going(tmp_path, starts) == 0
    assert starts.seen == [(["first"], None), (["again"], "1"), (["again"], "2")]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["failed", "failed", "recovered"]
    assert events[0]["step"] == 8 and events[0]["cause"].startswith("DeepSpeed's launcher was ended by SIGKILL")
    (alert,) = alerts(tmp_path)  # the second comes too soon after it
    assert (alert["title"], alert["level"], alert["step"], alert["run"]) == ("failed", "warn", 8, tmp_path.name)
    assert "was ended by SIGKILL" in alert["text"] and "goes on from its newest sound checkpoint" in alert["text"]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("summary", "code", "starts"),
    [
        ({"complete": False, "diverged": False}, 137, 2),  # the launcher was killed: the ranks were stopped after it
        ({"complete": False, "diverged": False}, 143, 1),  # it was told to end, and its ranks with it
        ({"complete": True, "diverged": False}, 137, 1),
        ({"complete": False, "diverged": True}, 139, 1),
    ],
)
def test_ranks_that_save_since_their_launcher_was_killed_have_not_ended_the_run(summary, code, starts, tmp_path):
    class Saves(Starts):
        def __call__(self, *arguments, **more):
            (tmp_path / SUMMARY).write_text(json.dumps(summary))
            return super().__call__(*arguments, **more)

    made = Saves(code, 0)
    assert kept_going(tmp_path, made) == (0 if starts == 2 else code) and len(made.seen) == starts


@pytest.mark.parametrize("code", [2, 3])
def test_bad_input_and_divergence_end_it(code, tmp_path):
    starts = Starts(code)
    assert kept_going(tmp_path, starts) == code and not (tmp_path / "events.jsonl").exists() and not alerts(tmp_path)


@pytest.mark.usefixtures("at_once")
def test_bad_input_at_a_restart_is_alerted(tmp_path):
    assert kept_going(tmp_path, Starts(137, 2)) == 2
    ended = alerts(tmp_path)[-1]
    assert (ended["title"], ended["level"]) == ("not started again", "error")
    assert ended["text"] == "restart 1 was refused as bad input, and the run is not started again"
    last = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "failed" and last["not_restarted"] == "restart 1 cannot work as it is"


def watched(tmp_path, layout, code, *failures, gone=()):
    """What a start of two ranks has failed with that ended with a code."""
    watch = _Watch(Persistence(layout, tmp_path, LaunchConfig(), []))
    for rank in range(2):
        heart = Heart()
        heart.share(str(watch.folder), rank)
        heart.begin_step(8)
    watch.dog.look()
    watch.dog.gone = [Gone(watch.dog.beats[rank], own) for rank, own in gone]
    for rank, failure in failures:
        heartbeat.failure_of(watch.folder, rank).write_text(json.dumps(failure))
    failure = watch.failure(code)
    remove_heartbeats(watch.folder)
    return failure


def test_a_lost_host_is_named_before_ranks_that_are_ended_since_it_is(tmp_path):
    lost = {"time": HOST_LOST, "reason": "host b is lost: x", "by_itself": False}
    found = watched(tmp_path, Layout(2, 1, 1), 1, (1, lost), gone=[(0, 1)])
    assert (found.rank, found.cause, found.by_itself) == (1, "failed (host b is lost: x)", False)
    found = watched(tmp_path, Layout(2, 1, 1), 1, (1, {**lost, "time": 9.0}), gone=[(0, 1)])
    assert (found.rank, found.cause) == (0, "ended with exit code 1 and without a word")


def test_signals_without_a_name_are_said_by_number(tmp_path):
    layout = Layout(2, 1, 1)
    assert watched(tmp_path, layout, 163, gone=[(1, -35)]).cause == "was ended by signal 35"
    assert watched(tmp_path, layout, 128 + 127).cause == "DeepSpeed's launcher was ended by signal 127"


class Stalls:
    """Starts of two ranks, the second of which computes in the first start, and which both agree in the second."""

    def __init__(self):
        self.count = 0

    def __call__(self, arguments, environment, look):
        self.count += 1
        hearts = [Heart(), Heart()]
        for rank, heart in enumerate(hearts):
            heart.share(environment[FOLDER], rank)
            heart.begin_step(8)
            heart.at(Phase.AGREE)
        if self.count == 1:
            hearts[1].in_pass()
        while self.count < 3 and not look():
            pass
        return 137 if self.count < 3 else 0


@pytest.mark.usefixtures("at_once")
def test_where_all_ranks_wait_for_each_other_none_is_named(tmp_path, monkeypatch):
    def collect(beats, *more):
        time.sleep(0.5)
        return dict.fromkeys(beats, "")

    monkeypatch.setattr("launch.persistence.collect", collect)
    failures = []
    settings, shrink = LaunchConfig(stall_seconds=0.1), lambda failure: failures.append(failure)
    alerting = AlertsConfig(["tee", "-a", str(tmp_path / "told")])
    persistence = Persistence(Layout(2, 1, 1), tmp_path, settings, [], shrink, alerting)
    assert persistence.run(Stalls(), [], Signals) == 0
    assert [(failure.rank, failure.cause) for failure in failures] == [
        (1, "held up the others"),
        (None, "the run does not move"),
    ]
    (alert,) = alerts(tmp_path)
    assert alert["title"] == "stalled" and alert["text"].startswith("rank 1 on ") and "held up" in alert["text"]
    recovered = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert recovered["seconds"]["restarting"] >= 0.5, "to collect stacks comes after the failure was noticed"


def test_a_signal_ends_it_whatever_the_code_is_and_while_it_waits(tmp_path, monkeypatch):
    class Stopped(Signals):
        first = signal.SIGTERM

    assert kept_going(tmp_path, Starts(1), Stopped) == 1
    monkeypatch.setattr("launch.restarts.LONGEST_WAIT", 60.0)

    class WhileItWaits(Signals):
        asked = 0

        @property
        def fatal(self):
            self.asked += 1
            return signal.SIGINT if self.asked > 2 else None

    hangs = AlertsConfig(["sleep", "600"], timeout_seconds=600.0)
    assert kept_going(tmp_path, Starts(137), WhileItWaits(), alerting=hangs) == 130


@pytest.mark.usefixtures("at_once")
def test_before_a_run_has_begun_it_begins_as_it_was_told(tmp_path):
    starts = Starts(137, 0, reaches=Phase.START)
    assert kept_going(tmp_path, starts) == 0
    assert [arguments for arguments, _ in starts.seen] == [["first"], ["first"]]


def test_one_that_has_come_to_its_end_is_not_started_again(tmp_path):
    class Ends(Starts):
        def __call__(self, *arguments, **more):
            (tmp_path / "summary.json").write_text("{}")
            return super().__call__(*arguments, **more)

    assert kept_going(tmp_path, Ends(1)) == 1


@pytest.mark.usefixtures("at_once")
def test_the_budget_ends_it_with_the_code_of_the_last_failure(tmp_path, capsys):
    assert kept_going(tmp_path, Starts(137, 134), restarts=1) == 134
    assert "is not started again: it has been started again 1 times within 24 hours" in capsys.readouterr().err
    assert [(alert["title"], alert["level"]) for alert in alerts(tmp_path)] == [
        ("failed", "warn"),
        ("not started again", "error"),
    ]


def test_events_that_the_disk_does_not_take_wait_for_the_end_and_are_counted_then(tmp_path):
    events = Events(tmp_path)
    with full(10):
        for _ in range(3):
            events.failed(KILLED, 1.0)
        assert events.close() == 3
    later = tmp_path / "later"
    later.mkdir()
    events = Events(later)
    with full(10):
        events.failed(KILLED, 1.0)
    assert events.close() == 0 and last_failure(later)["rank"] == 1
    assert Events(tmp_path / "never there").close() == 0
