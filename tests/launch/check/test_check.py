"""`deepnarrow check` with real ranks: under a launcher, where one is slow, and as the command that starts them."""

import json
import os

import pytest

from conf.clusters import cluster_from_file
from launch.check.measure import RankFindings
from launch.cli import main
from tests.launch.check.slowed import SLOW
from tests.ranks import nursery


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """What four ranks that a launcher has started found, of which one is slow: exit codes, JSON, the cluster file."""
    folder = tmp_path_factory.mktemp("check")
    arguments = ["check", "parallel.pp=2", "parallel.tp=2", "--json", "--percent=25", f"--save={folder}/c.yaml"]
    ranks = nursery().start("tests.launch.check.slowed", 4, arguments, folder)
    codes = ranks.wait(180)
    log = (folder / "rank0.log").read_text()
    assert "{" in log, log
    return codes, json.JSONDecoder().raw_decode(log[log.index("{") :])[0], folder / "c.yaml"


def test_the_slow_rank_is_named_and_the_exit_code_says_so(checked):
    codes, found, _ = checked
    slow = f"rank {SLOW} on {os.uname().nodename}"
    for what in ("matrix product", "memory"):
        # It measures alone for most of the time, when the others are through, and is still slower than they were.
        assert any(said.startswith(f"{slow}: its {what} is ") for said in found["odd"]), found["odd"]
    assert codes[0] == 1
    assert bool(found["shared"]) == (len(os.sched_getaffinity(0)) < 4)


def test_every_link_of_the_layout_is_measured(checked):
    ranks = [RankFindings.from_json(one) for one in checked[1]["ranks"]]
    assert [one.rank for one in ranks] == [0, 1, 2, 3]
    groups = {(link.kind, link.operation, link.ranks) for one in ranks for link in one.links}
    tensor = {("tp", operation, pair) for operation in ("all_gather", "reduce_scatter", "all_reduce")
              for pair in ((0, 1), (2, 3))}  # fmt: skip
    assert groups == tensor | {("pp", "send", (0, 2)), ("pp", "send", (1, 3))}
    for one in ranks:
        assert one.product_flops > 0 and one.copy_bytes > 0 and all(link.seconds > 0 for link in one.links)
        of_sends = sorted(link.num_bytes for link in one.links if link.operation == "send")
        assert of_sends == [2**12, 2**18, 2**22]


def test_the_links_are_saved_as_measured(checked):
    _, found, path = checked
    cluster = cluster_from_file(path)
    assert cluster.measured == ["intra_gb_per_s", "intra_share", "protocols"]
    assert cluster.intra_gb_per_s == found["cluster"]["intra_gb_per_s"] and len(cluster.protocols) == 1
    assert "4 ranks" in path.read_text().splitlines()[0]


@pytest.mark.launch
def test_the_command_starts_the_ranks_of_the_layout_itself(tmp_path, capsys):
    code = main(["check", "parallel.pp=2", f"--save={tmp_path}/new.yaml"])
    said = capsys.readouterr()
    rows = [line for line in said.out.splitlines() if line.startswith("│")]
    assert len(rows) == 2 and "pp send" in said.out
    named = "slower than the median of 2" in said.out
    assert code == int(named) and named != ("nothing is more than 20 % slower" in said.out)
    assert "not compared, since there is only one: pp send of 4 KiB in a machine of ranks 0, 1" in said.out
    assert cluster_from_file(tmp_path / "new.yaml").measured


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel.pp=9"], "parallel.pp=9: more stages than the 8 layers"),
        (["--percent=0"], "--percent=0: is above 0 and below 100; 20 would work"),
        (["--save=c.txt"], "--save=c.txt: is to be YAML; c.yaml would work"),
        (["--save=nowhere/c.yaml", "model=none"], "model=none: no such preset"),
        (
            ["--hostfile=hosts"],
            "--hostfile=hosts: [Errno 2] No such file or directory: 'hosts'; a file with",
        ),
        (
            ["--hostfile=bad", "parallel.pp=2"],
            "--hostfile=bad: line 2, 'node2 slots=many', is no host; `node1",
        ),
        (["--hostfile=twice"], "--hostfile=twice: line 3: node1 stands there twice; once would work"),
        (["--hostfile=few", "parallel.pp=2"], "parallel.pp=2: 3 processes cannot be laid out as pipelines of 2"),
    ],
)
def test_what_cannot_work_is_said_before_a_rank_is_started(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_text("node1 slots=2\nnode2 slots=many\n")
    (tmp_path / "twice").write_text("node1 slots=2  # first\n\nnode1 slots=2\n")
    (tmp_path / "few").write_text("node1 slots=2\nnode2 slots=1\n")
    monkeypatch.setattr("launch.check.run._started", lambda *_: pytest.fail("ranks were started"))
    assert main(["check", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_hostfiles_ranks_are_started_by_its_launcher(tmp_path, monkeypatch):
    """The command of DeepSpeed's launcher, without machines to run it on: tests/hosts has those."""
    from launch.check import run

    commands = []
    monkeypatch.setattr(run, "_ended_with_us", lambda command: commands.append(command) or 1 / 0)
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    with pytest.raises(ZeroDivisionError):
        main(["check", "parallel.pp=2", "parallel.tp=2", f"--hostfile={tmp_path}/hosts"])
    (command,) = commands
    assert command[command.index("--hostfile") + 1] == str(tmp_path / "hosts")
    assert command[-2].endswith("launch/check/rank.py") and "--no_local_rank" in command
