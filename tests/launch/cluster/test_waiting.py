"""A host that is lost is waited for, or another in its place; hosts answer here where a file of their name is."""

from types import SimpleNamespace

import pytest

from conf import launch_settings
from conf.compose import compose_overrides
from conf.launch_settings import LaunchConfig
from launch.cluster import command, waiting
from launch.cluster.command import LeaveOut, WaitForHosts
from launch.hostfile import slots_of
from parallel.layout import Layout
from tests.launch.test_restarts import KILLED


@pytest.fixture
def played(overrides, tmp_path, monkeypatch):
    """Make the wait over three hosts of two ranks, of which b is lost; what `looks` does happens between two looks."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=2\nb slots=2\nc slots=2\n")
    for name in "ac":
        (tmp_path / name).touch()
    signals = SimpleNamespace(fatal=None)

    def make(*more, looks=(), minutes=1.0):
        given = ["parallel.pp=2", "train.micro_batch=1", "train.global_batch=12", f"launch.host_wait_minutes={minutes}"]
        prepared = SimpleNamespace(config=compose_overrides([*overrides, *given, *more]).config)
        # With two failures of the host of a rank it would be left out: these are of one that is not known.
        cluster = SimpleNamespace(slots=slots_of(hostfile), lost=["b"], host_of=lambda rank: None)
        cluster.reach = lambda name, words: ["test", "-e", str(tmp_path / name)]
        looks, looked = list(looks), []

        def hosts():
            if looked and looks:
                looks.pop(0)()
            looked.append(True)
            return slots_of(hostfile)

        wait = WaitForHosts(cluster, prepared, LeaveOut(cluster, prepared), hosts, signals)
        return SimpleNamespace(wait=wait, cluster=cluster, hostfile=hostfile, looked=looked, signals=signals)

    real = command.wait_for_all
    monkeypatch.setattr(command, "wait_for_all", lambda *of: real(*of, every=0.0))
    return make


def test_a_host_that_comes_back_is_waited_for_and_the_layout_stays(played, tmp_path, capsys):
    run = played("parallel.dp=3", looks=[lambda: None, (tmp_path / "b").touch], minutes=7)
    assert run.wait(KILLED) is None and list(run.cluster.slots) == ["a", "b", "c"] and len(run.looked) == 3
    said = capsys.readouterr().err
    assert said.count("b: no answer; waiting for that, or for another in its place in the hostfile, 7 minutes") == 1
    assert said.count("(launch.host_wait_minutes); test: exit code 1\n") == 1
    assert "all hosts answer, after 0 s: a, b, c" in said


def test_a_host_whose_reason_changes_is_said_once(played, tmp_path, capsys, monkeypatch):
    reasons = iter("abcdefgh")
    real = waiting.absent
    monkeypatch.setattr(waiting, "absent", lambda *of: {name: next(reasons) for name in real(*of)})
    played("parallel.dp=3", looks=[lambda: None] * 3 + [(tmp_path / "b").touch]).wait(KILLED)
    assert capsys.readouterr().err.count("b: no answer") == 1


def test_another_host_takes_its_place_in_the_hostfile(played, tmp_path, capsys):
    (tmp_path / "d").touch()
    half_written, written = "a slots=2\nd slots=\n", "a slots=2\nd slots=2\nc slots=2\n"
    looks = [lambda text=text: run.hostfile.write_text(text) for text in (half_written, written)]
    run = played("parallel.dp=3", looks=looks)
    assert run.wait(KILLED) == Layout(3, 2, 1) and run.cluster.slots == {"a": 2, "d": 2, "c": 2}
    said = capsys.readouterr().err
    assert "line 2, 'd slots=', is no host" in said and "the run goes on over a, d, c: dp3 x pp2 x tp1" in said


def test_where_the_others_can_go_on_the_wait_is_short_and_where_nobody_is_left_it_is_not(played, tmp_path, capsys):
    run = played(looks=[(tmp_path / "b").touch], minutes=30)
    assert run.wait(KILLED) is None
    assert "1 minutes at most (launch.host_wait_minutes)" in capsys.readouterr().err
    (tmp_path / "b").unlink()
    run = played(looks=[(tmp_path / "b").touch], minutes=30)
    run.cluster.lost = ["a", "b", "c"]
    assert run.wait(KILLED) is None
    assert "30 minutes at most (launch.host_wait_minutes)" in capsys.readouterr().err


def test_after_the_wait_those_that_answer_go_on_where_dp_can_be_smaller(played, capsys):
    run = played(minutes=1e-9)
    assert run.wait(KILLED) == Layout(2, 2, 1) and run.cluster.slots == {"a": 2, "c": 2}
    run = played("parallel.dp=3", minutes=1e-9)
    assert run.wait(KILLED) is None and list(run.cluster.slots) == ["a", "b", "c"]
    assert "the 4 ranks of the hosts that answer would not do (parallel.dp=3: " in capsys.readouterr().err


def test_nobody_is_waited_for_where_no_host_was_lost_or_it_is_not_wanted_or_the_run_is_told_to_end(played):
    run = played(minutes=0)
    assert run.wait(KILLED) is None and run.looked == []
    run = played()
    run.cluster.lost = []
    assert run.wait(KILLED) is None and run.looked == []
    run = played(looks=[lambda: setattr(run.signals, "fatal", 15)])
    assert run.wait(KILLED) is None and list(run.cluster.slots) == ["a", "b", "c"] and len(run.looked) == 2


def test_a_host_that_was_left_out_stays_so_whatever_the_hostfile_says(played, tmp_path):
    run = played()
    run.wait._leave_out.names.add("b")
    run.cluster.slots = {"a": 2, "c": 2}
    assert run.wait(KILLED) is None and run.cluster.slots == {"a": 2, "c": 2}


def test_a_command_that_hangs_or_is_not_there_is_no_answer(monkeypatch):
    monkeypatch.setattr(waiting, "ANSWER", 3.0)
    words = {"a": ["true"], "b": ["sleep", "60"], "c": ["/no/such/command"], "d": ["false"]}
    words["e"] = ["sh", "-c", "echo a banner >&2; echo ssh: no route to e >&2; exit 255"]
    words["f"] = ["sh", "-c", "sleep 6 & echo it stays in the background >&2"]
    assert waiting.absent(dict.fromkeys(words, 1), lambda name, command: words[name]) == {
        **{"b": "sleep: not within 3 s", "c": "/no/such/command: No such file or directory"},
        **{"d": "false: exit code 1", "e": "ssh: no route to e"},
    }


@pytest.mark.parametrize("minutes", [-1.0, float("inf"), float("nan")])
def test_a_wait_that_is_no_time_is_refused(minutes):
    (problem,) = launch_settings.problems(LaunchConfig(host_wait_minutes=minutes))
    assert problem.startswith(f"launch.host_wait_minutes={minutes}: ") and problem.endswith("or 30 would work")
