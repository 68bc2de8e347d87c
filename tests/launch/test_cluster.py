"""What the command of several hosts decides: who is left out, what is passed on, what is said before a start."""

import base64
import io
import json
import queue
import signal
import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from conf.compose import compose_overrides
from launch import cli
from launch.cluster import agent, hosts
from launch.cluster.command import LeaveOut
from launch.cluster.hosts import Host, _passed
from launch.watchdog import Watchdog, heartbeats_folder, remove_heartbeats
from parallel import heartbeat
from parallel.heartbeat import FOLDER, Heart, Phase, beat_of, content_of, file_of, moved, read
from parallel.layout import Layout
from parallel.processes import SUPERVISOR
from parallel.schedules import Action, Pass
from tests.launch.test_restarts import KILLED


def left_out(overrides, failures, **slots):
    cluster = SimpleNamespace(slots=slots, host_of=lambda rank: None if rank is None else list(slots)[rank // 2])
    prepared = SimpleNamespace(config=compose_overrides(overrides).config)
    leave_out = LeaveOut(cluster, prepared)
    layouts = [leave_out(replace(KILLED, rank=rank)) for rank in failures]
    return layouts, list(cluster.slots)


def test_a_host_that_has_failed_twice_is_left_out_and_dp_is_smaller(overrides, capsys):
    given = [*overrides, "parallel.pp=2", "train.micro_batch=1", "train.global_batch=12"]
    layouts, rest = left_out(given, [2, 0, 3], a=2, b=2, c=2)
    assert layouts == [None, None, Layout(2, 2, 1)] and rest == ["a", "c"]
    assert "b has failed 2 times and is left out: dp2 x pp2 x tp1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["parallel.dp=3"], "parallel.dp=3: "),
        (["train.global_batch=9", "train.micro_batch=3"], "train.global_batch=9"),
        (["parallel.pp=3"], "parallel.pp=3: "),
    ],
)
def test_a_host_without_which_there_is_no_layout_stays_and_it_is_said_why(more, why, overrides, capsys):
    given = [*overrides, "parallel.pp=2", "train.micro_batch=1", "train.global_batch=12", *more]
    layouts, rest = left_out(given, [2, 2], a=2, b=2, c=2)
    assert layouts == [None, None] and rest == ["a", "b", "c"]
    assert (
        f"b has failed 2 times and stays, since the 4 ranks of the others would not do ({why}"
        in capsys.readouterr().err
    )


def test_where_the_rank_is_not_known_or_the_host_is_the_only_one_nobody_is_left_out(overrides):
    assert left_out(overrides, [None, None, None], a=2, b=2) == ([None] * 3, ["a", "b"])
    assert left_out(overrides, [0, 0, 0], a=2) == ([None] * 3, ["a"])


def test_variables_that_all_hosts_need_the_same_are_passed_and_no_others():
    here = {"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "k", "HOME": "/root", FOLDER: "/dev/shm/x", SUPERVISOR: "1"}
    assert _passed(here) == {"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "k"}


class NoSignals:
    """A command that is told nothing."""

    first = fatal = None

    def to(self, ranks):
        pass


def test_the_pipes_of_ranks_with_gpus_are_in_a_folder_of_their_own_host(tmp_path, monkeypatch):
    """A rank that cannot make its pipe ends, and the command's folder is on no other host."""
    orders, started = [], []
    ended = SimpleNamespace(ended=0, lost=None, cut=lambda: None)
    monkeypatch.setattr(hosts, "Host", lambda name, ranks, order, *rest: orders.append(order) or ended)
    monkeypatch.setattr(agent.subprocess, "Popen", lambda command, env, **more: started.append(env))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    of_command = heartbeats_folder()
    hosts.Cluster({"a": 1}, tmp_path / "run", NoSignals()).start([], {FOLDER: str(of_command)}, lambda: False)
    (order,) = orders
    assert str(of_command) not in json.dumps(order) and order["environment"]["NCCL_DEBUG"] == "INFO"
    made = agent.Agent(json.loads(json.dumps(order)), io.StringIO())
    (env,) = started
    assert env["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] == f"{made.folder}/nccl-" and made.folder.is_dir()
    assert env["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/run/stalls/flight-recorder-rank-"
    for folder in (of_command, made.folder):
        remove_heartbeats(folder)


def test_what_a_host_says_of_its_ranks_is_read_here_with_times_of_this_clock(tmp_path):
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir(), here.mkdir()
    heart = Heart()
    heart.share(str(there), 1)
    heart.begin_step(7)
    heart.at(Phase.AGREE)
    content = base64.b64encode(file_of(there, 1).read_bytes().rstrip(b"\0")).decode()
    mirror = SimpleNamespace(_folder=here)
    failure = {"reason": "x", "by_itself": True, "time": 5.0}
    Host._mirror(mirror, 1, {"beat": content, "state": ["stopped", None], "failure": failure}, 1e6)
    found, was = read(file_of(here, 1)), read(file_of(there, 1))
    assert (found.rank, found.step, found.phase) == (1, 7, Phase.AGREE)
    assert found.time == pytest.approx(was.time + 1e6, abs=1e-3)
    heart.device_in(heart.place, Phase.PASS, Action(Pass.F, 0, 2), 3)  # its device is behind
    found, was = beat_of(moved(content_of(file_of(there, 1)), 1e6)), read(file_of(there, 1))
    assert found.on_device and found.time == pytest.approx(was.time + 1e6, abs=1e-3)
    dog = Watchdog(here, Layout(1, 2, 1), None)
    dog.look()
    assert dog.failures() == [(5.0 + 1e6, 1, "x", True)] and dog._halted_since.keys() == {1}  # it runs on this host


def test_orders_that_a_signal_s_handler_sends_while_one_is_sent_arrive_whole(tmp_path):
    host = Host("a", range(1), {"first": "x" * 100_000}, tmp_path, lambda name, command: ["tee", str(tmp_path / "all")])
    sent = 0

    def tell(number=None, frame=None):
        nonlocal sent
        sent += 1
        host.tell({"here": True})

    before = signal.signal(signal.SIGALRM, tell)
    signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
    try:
        for _ in range(3000):
            tell()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    host._link.stdin.close()
    host._reader.join(30)
    host.cut()
    lines = [json.loads(line) for line in (tmp_path / "all").read_text().splitlines()]
    assert sent > 3000 and len(lines) == 1 + sent and lines[1:] == [{"here": True}] * sent


def test_silence_is_the_same_cause_however_long_it_took_to_notice(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "CONNECT", 0.25)
    host = Host("a", range(1), {}, tmp_path, lambda name, command: ["sleep", "60"])
    while host.lost is None:
        time.sleep(0.1)
        host.check()
    host.cut()
    assert host.lost == "nothing was heard of it for 0.25 s"


def test_what_was_ended_at_once_by_a_signal_has_the_code_of_that_signal(tmp_path):
    signals = NoSignals()
    cluster = hosts.Cluster({"a": 1}, tmp_path, signals)
    cluster._hosts = [SimpleNamespace(ended=256 - signal.SIGSEGV, lost=None)]
    assert cluster._code() == 128 + signal.SIGSEGV
    signals.fatal = signal.SIGINT
    assert cluster._code() == 130


def test_a_signal_before_there_are_ranks_ends_the_launcher_of_the_host(tmp_path):
    one = agent.Agent.__new__(agent.Agent)
    one.folder, one._ranks, one._said, one._out = tmp_path, [0], {}, io.StringIO()
    one.group = subprocess.Popen(["sleep", "60"], start_new_session=True)
    orders = queue.SimpleQueue()
    orders.put({"signal": signal.SIGTERM})
    assert one.run(orders) == -signal.SIGKILL


def test_of_failures_on_several_hosts_the_first_is_the_one_that_came_first_not_the_one_heard_of_first(tmp_path):
    """Rank 1 has only heard of the failure of rank 0, and its host reports a little before that of rank 0."""
    here = tmp_path / "here"
    here.mkdir()
    reports = []
    for rank, reason, ago in ((0, "the cause", 5.0), (1, "rank 0 had failed", 4.5)):
        one = SimpleNamespace(folder=tmp_path / f"host-{rank}", _ranks=[rank], _said={}, send=reports.append)
        one.folder.mkdir()
        heart = Heart()
        heart.share(str(one.folder), rank)
        failure = heartbeat.failure_of(one.folder, rank)
        failure.touch()  # it is being written
        agent.Agent.report(one)
        failure.write_text(json.dumps({"time": time.monotonic() - ago, "reason": reason, "by_itself": True}))
        agent.Agent.report(one)
    unfinished, whole = reports[0::2], reports[1::2]
    for told in (*unfinished, *reversed(whole)):
        for rank, said in told["ranks"].items():
            Host._mirror(SimpleNamespace(_folder=here), rank, said, time.monotonic() - told["now"])
    assert [reason for _, _, reason, _ in Watchdog(here, Layout(1, 2, 1), None).failures()] == [
        "the cause",
        "rank 0 had failed",
    ]


def test_without_a_hostfile_it_is_said_what_would_work(overrides, tmp_path, capsys):
    assert cli.main(["launch", *overrides]) == 2
    said = (
        "--hostfile: not given, and this is no job of Slurm's; a file with a line such as `node1 slots=8` for each host"
    )
    assert said in capsys.readouterr().err
    (tmp_path / "hosts").write_text("a slots=1\nb slots=2\n")
    assert cli.main(["launch", "--hostfile", str(tmp_path / "hosts"), *overrides, "parallel.pp=2"]) == 2
    assert "3 processes cannot be laid out as pipelines of 2" in capsys.readouterr().err
