"""Ranks that would wait for ever, or run as something else than was started: all end within seconds, and say why."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from filelock import FileLock

from conf.compose import compose_overrides
from launch import cli, supervise
from model.problems import BadInput
from parallel import environment
from parallel.groups import make_ranks
from parallel.layout import Layout
from parallel.processes import OF_A_LAUNCHER, free_port, read_launcher
from parallel.schedules import Placement
from tests.faults.host import LAUNCHERS
from tests.ranks import nursery
from tests.train.checkpoint import runs
from train import agreement, pretrain

SECONDS = 20
"""Within which all ranks of a run that cannot start have ended; most of it is for a machine where others compute."""


def ended(ranks):
    """The exit codes of ranks that end by themselves."""
    deadline = time.monotonic() + SECONDS
    while None in ranks.codes and time.monotonic() < deadline:
        time.sleep(0.02)
    codes = ranks.codes
    ranks.signal(signal.SIGKILL)
    return codes


def logs(folder, num=2):
    return [(folder / f"rank{rank}.log").read_text() for rank in range(num)]


@pytest.fixture(scope="module")
def trained(overrides, tmp_path_factory):
    """A run that is complete, for copies."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    runs.finish(folder, 1, *overrides, "train.max_steps=2")
    return folder


def _of_another_model(folder, trained):
    shutil.copytree(trained, folder)
    return {"more": ["model.d_ff=96"]}


def _locked(folder, trained):
    folder.mkdir()
    lock = FileLock(folder / ".lock")
    lock.acquire()
    return {"held": lock}


def _hydra_cannot_write(folder, trained):
    folder.mkdir()
    (folder / ".hydra").write_text("")
    return {}


def _data_on_one_host(folder, trained):
    hosts = folder.parent / "hosts"
    for rank in "01":
        (hosts / rank).mkdir(parents=True)
    (hosts / "0" / "corpus").mkdir()
    (hosts / "0" / "corpus" / "a.txt").write_text("the text of one host\n" * 2000)
    return {
        "more": ['data.path="~/corpus"', 'data.cache_dir="~/cache"', "data.val_fraction=0"],
        "kind": f"hosts={hosts}",
    }


def _arguments_of_one_host(folder, trained):
    return {"more": ["name=node{rank}"], "kind": f"hosts={folder.parent}"}


def _one_does_not_come(folder, trained):
    return {"environment": {"WORLD_SIZE": "3", environment.TIMEOUT_MINUTES: "0.03"}, "more": ["train.global_batch=6"]}


FOUND_BY_ONE = {
    "B6 checkpoint of another model": (_of_another_model, 2, "model.d_ff=96: the checkpoint "),
    "B6 lock on the run folder": (_locked, 2, "another process is training in this run folder"),
    "B6 run folder that Hydra cannot write": (_hydra_cannot_write, 1, "FileExistsError: "),
    "B6 data on one host": (_data_on_one_host, 2, "corpus: no such file or folder"),
    "B6 other arguments on one host": (_arguments_of_one_host, 2, "and rank 0 was given name=node0"),
    "B6 a rank that does not come": (_one_does_not_come, 1, "1 of 3 ranks did not come within 0.03 minutes"),
}


@pytest.mark.launch
@pytest.mark.parametrize("case", FOUND_BY_ONE)
def test_what_one_rank_finds_wrong_ends_all_and_stands_in_each_log(case, overrides, trained, tmp_path):
    make, code, said = FOUND_BY_ONE[case]
    found = make(tmp_path / "run", trained)
    kind, more = found.get("kind"), found.get("more", [])
    given = [*overrides, *more, "train.max_steps=2", "sample.tokens=0", "wandb.mode=disabled"]
    given += ["parallel.pp=1", f"hydra.run.dir={tmp_path / 'run'}"]
    module, before = ("tests.faults.host", [kind]) if kind else ("train.pretrain", [])
    ranks = nursery().start(module, 2, [*before, *given], tmp_path, **found.get("environment", {}))
    assert ended(ranks) == [code] * 2, "\n".join(logs(tmp_path))
    for log in logs(tmp_path):
        assert log.count(said) >= 1, log
        assert "Traceback" not in log or code == 1, log


def test_rank_0_that_does_not_come_is_said(monkeypatch, capfd):
    monkeypatch.setenv(environment.TIMEOUT_MINUTES, "0.01")
    for key, value in zip(OF_A_LAUNCHER, ("1", "2", "1", "2", "2", "127.0.0.1", str(free_port())), strict=False):
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit) as end:
        pretrain.main(["model=tiny"])
    assert end.value.code == 1
    assert "rank 0 was not met there within 0.01 minutes (DEEPNARROW_TIMEOUT_MINUTES)" in capfd.readouterr().err


SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
SLURM |= {"SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_JOB_ID": "7"}
READ = {
    "B7 Slurm, a list of hosts": (
        {**SLURM, "SLURM_JOB_NODELIST": "gpu7,gpu9"},
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "MASTER_ADDR": "gpu7"},
    ),
    "B7 Slurm, scontrol": (
        {**SLURM, "SLURM_JOB_NODELIST": "gpu[7-8]"},
        {"MASTER_ADDR": "gpu7", "MASTER_PORT": "29507"},
    ),
    "B7 Open MPI inside Slurm": (
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}
        | {"OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_SIZE": "4", "MASTER_ADDR": "127.0.0.1"},
    ),
    "B7 MPICH": (
        {"PMI_RANK": "1", "PMI_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
    ),
    "B7 one task of Slurm's is no launcher": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
    "B7 no launcher": ({"WORLD_SIZE": "2"}, None),
}


@pytest.mark.parametrize("case", READ)
def test_launchers_that_set_no_rank_are_read(case, tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho gpu7\necho gpu8\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found, expected = dict(READ[case][0]), READ[case][1]
    assert read_launcher(found) is (expected is not None)
    assert expected is None or expected.items() <= found.items()


REFUSED = {
    "B7 no host of rank 0": (
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"},
        "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=4: ",
    ),
    "B7 no scontrol": ({**SLURM, "SLURM_JOB_NODELIST": "gpu[7-8]"}, "MASTER_ADDR=HOST"),
    "B7 no count": ({"PMIX_RANK": "2"}, "PMIX_RANK=2: "),
    "B7 half of it": ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0: MASTER_ADDR, MASTER_PORT not set"),
    "B7 no number": ({"RANK": "a", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=a: not a number"),
    "B7 a rank too many": (
        {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
        "RANK=2: not below",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_launchers_that_do_not_say_enough_are_refused_by_name(case, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput) as caught:
        read_launcher(dict(REFUSED[case][0]))
    assert caught.value.problems[0].startswith(REFUSED[case][1]) or REFUSED[case][1] in caught.value.problems[0]


@pytest.mark.launch
@pytest.mark.parametrize("launcher", [pytest.param(name, id=f"B7 {name}") for name in LAUNCHERS])
def test_processes_of_such_a_launcher_are_one_run(launcher, overrides, tmp_path):
    asked = [
        *overrides,
        "train.max_steps=1",
        "sample.tokens=0",
        "wandb.mode=disabled",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    ranks = nursery().start("tests.faults.host", 2, [launcher, *asked], tmp_path)
    assert ended(ranks) == [0, 0], "\n".join(logs(tmp_path))
    assert "dp2 x pp1 x tp1" in logs(tmp_path)[0]


def test_b7_what_another_launcher_left_in_the_shell_is_nothing_to_a_command_that_starts_processes(
    overrides, tmp_path, monkeypatch, capsys
):
    started = []
    monkeypatch.setattr(supervise, "launch", lambda arguments, num, *more: started.append(num) or 0)
    for key, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_SIZE", "2")):
        monkeypatch.setenv(key, value)
    assert cli.main(["train", *overrides, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    assert started == [1] and "RANK" not in os.environ
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "--cfg", "job", "model=67b"]) == 0  # rank 1 of a launcher would leave it to rank 0
    assert "n_layers: 95" in capsys.readouterr().out


def test_b7_generate_is_alone_where_a_launcher_left_less_than_it_sets(trained, monkeypatch, capsys):
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(key, value)
    assert cli.main(["generate", str(trained), "--prompt", "a", "--max-tokens", "2"]) == 0, capsys.readouterr().err


@pytest.mark.launch
@pytest.mark.parametrize("told", [(0,), (1,), (0, 1)], ids=["B8 rank 0", "B8 rank 1", "B8 both"])
def test_a_first_signal_at_the_start_ends_all_at_once(told, overrides, tmp_path):
    asked = [*overrides, "train.global_batch=6", "wandb.mode=disabled", f"hydra.run.dir={tmp_path / 'run'}"]
    ranks = nursery().start("train.pretrain", 2, asked, tmp_path, WORLD_SIZE="3")  # they wait for the third
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "run" / ".hydra").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1)
    ranks.signal(signal.SIGTERM, *told)
    assert ended(ranks) == [128 + signal.SIGTERM] * 2, "\n".join(logs(tmp_path))
    for log in logs(tmp_path):
        assert log.count("told to stop (SIGTERM) before the first step: nothing is to be saved") == 1, log


@pytest.mark.launch
def test_b9_a_frozen_rank_is_noticed_in_the_time_that_was_set(overrides, tmp_path):
    asked = [*overrides, "train.total_tokens=1e12", "parallel.pp=2", "wandb.mode=disabled"]
    minutes = {environment.TIMEOUT_MINUTES: "0.04"}
    ranks = nursery().start("train.pretrain", 2, [*asked, f"hydra.run.dir={tmp_path / 'run'}"], tmp_path, **minutes)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + SECONDS
    while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.02)
    ranks.signal(signal.SIGSTOP, 1)
    while ranks.codes[0] is None and time.monotonic() < deadline + SECONDS:
        time.sleep(0.02)
    code = ranks.codes[0]
    ranks.signal(signal.SIGKILL)
    assert code == 1, logs(tmp_path)[0]


def test_b9_only_checkpoints_are_waited_for_by_the_hour(monkeypatch):
    asked = []
    monkeypatch.setattr(dist, "new_group", lambda **how: asked.append(how["timeout"]))
    monkeypatch.setenv(environment.TIMEOUT_MINUTES, "3")
    agreement.control_group()
    agreement.checkpoint_group()
    assert asked == [timedelta(minutes=3), timedelta(hours=6)]
    for wrong in ("soon", "0", "-1", "nan"):
        monkeypatch.setenv(environment.TIMEOUT_MINUTES, wrong)
        with pytest.raises(BadInput, match=f"DEEPNARROW_TIMEOUT_MINUTES={wrong}: not a number of minutes"):
            environment.timeout()


def test_b9_what_is_no_time_is_said_before_a_process_starts(overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(environment.TIMEOUT_MINUTES, "soon")
    assert cli.main(["train", *overrides, "model.n_kv_heads=3", f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert "DEEPNARROW_TIMEOUT_MINUTES=soon" in said and "model.n_kv_heads=3" in said


RANK = """
import json, os, queue, subprocess, sys
from importlib.util import find_spec
own = subprocess.run([sys.executable, "-c", "import queue; print(queue.__file__)"], capture_output=True, text=True)
with open(sys.argv[1], "w") as file:
    json.dump([queue.__file__, own.stdout.strip(), find_spec('deepspeed').origin, os.getcwd(), *sys.argv[2:]], file)
"""


@pytest.mark.launch
def test_b10_what_lies_in_the_working_directory_is_not_imported(tmp_path, monkeypatch):
    here = tmp_path / "here"
    (here / "deepspeed").mkdir(parents=True)
    for file in ("deepspeed/__init__.py", "queue.py", "psutil.py", "json.py"):
        (here / file).write_text("raise SystemExit('of the working directory')\n")
    (tmp_path / "rank.py").write_text(RANK)
    monkeypatch.setattr(supervise, "PRETRAIN", tmp_path / "rank.py")
    monkeypatch.setattr(supervise, "completion", lambda run_dir: None)
    monkeypatch.chdir(here)
    given = ['name="a=b"', "it's", "$(hostname) `x` \\", "a  b"]
    supervise.launch([str(tmp_path / "found.json"), *given], 1, tmp_path)
    *imported, cwd, a, b, c, d = json.loads((tmp_path / "found.json").read_text())
    safe = imported if sys.version_info >= (3, 11) else [imported[0], imported[2]]
    assert not any(str(here) in path for path in safe) and cwd == str(here)
    assert [a, b, c, d] == given  # B11: no shell reads what we hand over


@pytest.mark.parametrize(("asked", "devices"), [("", [0, 1]), ("4,5,6", ["4", "5"]), ("3", [0, 1])])
def test_b10_the_launcher_gets_the_devices_that_the_command_sees(asked, devices, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
    assert supervise._devices(2) == devices


def over_pdsh(arguments):
    """What arrives on another host: DeepSpeed's launcher joins the arguments, and a shell there reads them."""
    from types import SimpleNamespace

    from deepspeed.launcher.multinode_runner import PDSHRunner

    handed_over = PDSHRunner(SimpleNamespace(user_args=arguments, user_script=""), "").user_arguments
    script = "import json, sys; print(json.dumps(sys.argv[1:]))"
    command = " ".join([sys.executable, "-c", shlex.quote(script), *handed_over])
    return json.loads(subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    "text",
    [
        'name="a=b"',
        "name='it s'",
        "x=$(hostname)",
        "x=`y` z",
        'x=$HOME \\ "q"',
        "sample.prompts=['a  b', \"c;d&\"]",
        "~a=*?",
    ],
)
def test_b11_an_argument_that_is_quoted_for_the_remote_shell_arrives(text):
    assert over_pdsh([pretrain.for_remote_shell(text)]) == [text]


def test_b11_quotes_that_a_remote_shell_took_are_said_with_what_would_arrive():
    (arrived,) = over_pdsh(['name="a=b"'])
    assert arrived == "name=a=b"
    assert pretrain.lost_quotes([arrived], {}) == [] == pretrain.lost_quotes(['name="a=b"'], {"CROSS_SIZE": "2"})
    (said,) = pretrain.lost_quotes([arrived], {"CROSS_SIZE": "2"})
    assert said.startswith("name=a=b: this is what has arrived")
    (typed,) = shlex.split(said.partition("typed as ")[2].partition(" it would")[0])
    assert compose_overrides(over_pdsh([typed])).config.name == "a=b"


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_b9_every_group_of_a_layout_has_the_time_that_was_set(backend, monkeypatch):
    asked = []
    monkeypatch.setenv(environment.TIMEOUT_MINUTES, "3")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(dist, "new_group", lambda ranks, **how: asked.append(how.get("timeout")))
    monkeypatch.setattr(dist, "split_group", lambda **how: asked.append(how.get("timeout")))
    make_ranks(Layout(2, 2, 2), Placement(2, 1, False), 1)
    assert set(asked) == {timedelta(minutes=3)}
