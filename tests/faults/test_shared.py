"""What hosts do not share is said before the first step, all of it at once, with the host that has it otherwise."""

import resource
import signal
import socket
import time
from collections import namedtuple
from dataclasses import replace

import psutil
import pytest

from parallel import environment, interfaces
from tests.ranks import nursery
from tests.train.checkpoint import runs
from train import hosts, preflight, version


@pytest.mark.launch
def test_a_host_that_has_all_otherwise_ends_all_ranks_with_a_sentence_for_each(overrides, tmp_path):
    for rank in "01":
        (tmp_path / rank).mkdir()
    given = [*runs.DEFAULTS, *overrides, "parallel.pp=1", "parallel.dp=2", "train.max_steps=2"]
    given = [f"{key}={value}" for key, value in dict(word.split("=", 1) for word in given).items()]
    # A path that leads every process into its own working directory: the folder is each host's own.
    arguments = [f"others={tmp_path}", *given, "hydra.run.dir=/proc/self/cwd/run"]
    ranks = nursery().start("tests.faults.host", 2, arguments, tmp_path)
    end = time.monotonic() + 60
    while None in ranks.codes and time.monotonic() < end:
        time.sleep(0.05)
    codes = ranks.codes
    ranks.signal(signal.SIGKILL)
    first, other = [(tmp_path / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert codes == [2, 2], first + other
    here = socket.gethostname()
    for begins in [
        "hydra.run.dir=/proc/self/cwd/run: what rank 0 has written there on ",
        "code: not that of rank 0 (",
        f"torch: 2.0.0 here and {hosts.versions()['torch']} on {here}, where rank 0 is; ",
        "ulimit -n 260: 2 processes need 264 open files each; ulimit -Hn 264 would work",
        "GLOO_SOCKET_IFNAME=ib7: this host has no such interface; ",
    ]:
        for log in (first, other):
            (line,) = [line for line in log.splitlines() if line.startswith(begins)]
            assert "would work" in line and line.endswith("(on node1)")
    assert first.count("(on node1)") == 5  # and nothing else
    assert f"the clock of node1 is 100 s behind that of {here}: " in other
    assert not (tmp_path / "0" / "run" / "metrics.jsonl").exists()


@pytest.fixture
def rank_0(tmp_path):
    return hosts.of_rank_0(tmp_path, saves=True)


def test_hosts_that_share_all_have_no_problems_and_where_nothing_is_saved_the_folder_is_none(rank_0, tmp_path):
    assert hosts.problems(rank_0) == []
    apart = tmp_path / "apart"
    apart.mkdir()
    assert hosts.problems(replace(hosts.of_rank_0(apart, saves=False), run_dir=tmp_path / "elsewhere")) == []
    assert list(apart.iterdir()) == []


def test_a_folder_that_shows_what_an_earlier_start_has_written_is_waited_for(rank_0, tmp_path, monkeypatch):
    now = hosts.of_rank_0(tmp_path, saves=True)
    assert now.token != rank_0.token and hosts.problems(now) == []
    monkeypatch.setattr(hosts, "PATIENCE", 0.0)
    (problem,) = hosts.problems(rank_0)  # of whom the folder holds nothing any more
    assert problem.startswith(f"hydra.run.dir={tmp_path}: what rank 0 has written there on ")


def test_the_same_commit_with_other_files_is_other_code(rank_0):
    (problem,) = hosts.problems(replace(rank_0, fingerprint="0" * 64))
    assert f"both hosts say {version.code_version()}, and files differ" in problem
    (problem,) = hosts.problems(replace(rank_0, fingerprint="0" * 64, code="abc"))
    assert f"({version.code_version()} here and abc on " in problem


def test_a_file_more_or_another_byte_is_another_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr(version, "__file__", str(tmp_path / "train" / "version.py"))
    seen = set()
    for name, text in [("model/a.py", "1"), ("model/a.py", "2"), ("conf/model/b.yaml", "2"), ("launch/c.py", "")]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        seen.add(version.fingerprint.__wrapped__())
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "d.py").write_text("no part of it")
    assert len(seen) == 4 and version.fingerprint.__wrapped__() in seen


def test_a_version_that_one_host_has_alone_is_said(rank_0):
    versions = {**rank_0.versions, "nccl": "2.27.3"}
    (problem,) = hosts.problems(replace(rank_0, versions=versions))
    here = rank_0.versions.get("nccl") or "none"  # of a PyTorch without CUDA
    assert problem == f"nccl: {here} here and 2.27.3 on {rank_0.host}, where rank 0 is; 2.27.3 would work"


def test_clocks_a_few_seconds_apart_are_not_said(rank_0):
    assert hosts.clock_warning(rank_0, 4.9) is None and hosts.clock_warning(rank_0, -4.9) is None
    assert f"is 60 s ahead of that of {rank_0.host}" in hosts.clock_warning(rank_0, 60.0)


Address = namedtuple("Address", "family address")
State = namedtuple("State", "isup")


@pytest.fixture
def two_interfaces(monkeypatch):
    addresses = {"lo": "127.0.0.1", "ens3": "10.0.0.7", "ens4": "10.1.0.7"}
    of = {name: [Address(socket.AF_INET, address)] for name, address in addresses.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: of)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {name: State(name != "ens4") for name in addresses})
    monkeypatch.setattr(socket, "gethostname", lambda: "node2")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")


def test_a_host_whose_own_name_is_the_loopback_is_told_so_where_others_have_to_reach_it(two_interfaces, monkeypatch):
    there = {"MASTER_ADDR": "node1"}
    (problem,) = interfaces.problems(there, several_hosts=True)
    assert problem.startswith(
        "node2: the own name of this host is 127.0.1.1, where no other host reaches it (/etc/hosts)"
    )
    assert "GLOO_SOCKET_IFNAME=ens3, or " in problem and problem.endswith("would work")
    assert interfaces.problems(there, several_hosts=False) == []
    assert interfaces.problems({"MASTER_ADDR": "127.0.0.1"}, several_hosts=True) == []  # several are played on one
    assert interfaces.problems({**there, "GLOO_SOCKET_IFNAME": "ens3"}, several_hosts=True) == []
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.7")
    assert interfaces.problems(there, several_hosts=True) == []

    def unknown(name):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    (problem,) = interfaces.problems(there, several_hosts=True)
    assert problem.startswith("node2: the own name of this host cannot be looked up (/etc/hosts)")


@pytest.mark.parametrize(
    ("asked", "absent"),
    [
        ({"NCCL_SOCKET_IFNAME": "ens"}, []),
        ({"NCCL_SOCKET_IFNAME": "=ens"}, ["NCCL_SOCKET_IFNAME=ens: "]),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, []),
        ({"NCCL_SOCKET_IFNAME": "ib,eth"}, ["NCCL_SOCKET_IFNAME=ib: ", "NCCL_SOCKET_IFNAME=eth: "]),
        ({"GLOO_SOCKET_IFNAME": "ens"}, ["GLOO_SOCKET_IFNAME=ens: "]),
        ({"GLOO_SOCKET_IFNAME": "ens3,ens4"}, []),
    ],
    ids=str,
)
def test_an_interface_that_is_asked_for_and_not_there_is_said(asked, absent, two_interfaces):
    found = interfaces.problems(asked, several_hosts=False)
    assert [problem.partition("this")[0] for problem in found] == absent
    assert all("; ens3 would work" in problem for problem in found)  # the other one is down


def test_ranks_judge_their_host_and_a_command_that_starts_none_here_does_not(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (260, 260))
    judged = lambda **machine: preflight._environment_problems(preflight.Machine(gpus=0, **machine), None)  # noqa: E731
    assert [problem[:4] for problem in judged(local_processes=1, processes=2)] == ["GLOO", "ulim"]
    assert judged(processes=2, elsewhere=True) == []
    assert environment.file_limit_problem(1) is None
