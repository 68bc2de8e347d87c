"""Every way in: a user's own files of the names of our packages, paths and names that cannot be, mistyped words."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from launch.bench import start
from launch.cli import main
from tests.ranks import ROOT

FLOORS = ("model", "parallel", "conf", "train", "launch")
SPAWNS = """
import multiprocessing
import deepnarrow

def job():
    import conf.paths, model.problems, train.version
    print(model.problems.__file__)

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=job)
    child.start()
    child.join()
    raise SystemExit(child.exitcode)
"""


def fill(folder, names):
    folder.mkdir()
    for name in names:
        (folder / f"{name}.py").write_text(f"raise SystemExit('a foreign {name}.py was imported')\n")
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder with a file of the name of each of our packages, which ends who imports it."""
    folder = fill(tmp_path_factory.mktemp("foreign") / "all", FLOORS)
    (folder / "spawns.py").write_text(SPAWNS)
    return folder


def test_files_of_the_names_of_our_packages_are_imported_by_no_entry(hostile):
    """Each entry is started in the folder of such files, with PYTHONPATH leading there as well."""
    both = os.pathsep.join([str(hostile), str(ROOT)])
    # `python -m launch.cli` asks for a launch, and Python takes the first that it finds before any of ours runs.
    but_launch = fill(hostile.parent / "but-launch", FLOORS[:-1])
    script = Path(sysconfig.get_path("scripts"), "deepnarrow")
    entries = {
        "the command": ([script, "describe", "tiny", "--json"], hostile, both, '"parameters"'),
        "the package": ([sys.executable, "-m", "deepnarrow", "--version"], hostile, both, "torch"),
        "the module": ([sys.executable, "-m", "launch.cli", "--version"], but_launch, str(ROOT), "torch"),
        "a rank": ([sys.executable, ROOT / "train" / "pretrain.py", "--cfg", "job"], hostile, both, "preset: tiny"),
        "a spawned process": ([sys.executable, "spawns.py"], hostile, both, str(ROOT / "model" / "problems.py")),
    }
    started = [
        subprocess.Popen(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, text=True, stdout=subprocess.PIPE, stderr=-2
        )
        for command, folder, path, _ in entries.values()
    ]
    for (name, (*_, expected)), process in zip(entries.items(), started, strict=True):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and expected in said, (name, said[-2000:])


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_nor_by_a_process_that_a_benchmark_starts(safe_path, hostile, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(hostile))
    monkeypatch.setenv("PYTHONSAFEPATH", safe_path)
    slow = "import train.pretrain, train.preflight, train.loop, parallel.deepspeed_engine"
    assert slow in start._IMPORTS
    monkeypatch.setattr(start, "_IMPORTS", start._IMPORTS.replace(slow, f"import {', '.join(FLOORS)}"))
    assert start._imports()["import_files"] > len(FLOORS)


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_a_home_is_a_home_in_every_key_and_argument(home, corpus, capsys):
    (home / "corpus").symlink_to(corpus)
    small = ["model.vocab_size=400", "model.d_model=32", "model.n_heads=4", "model.n_layers=2", "train.seq_len=32"]
    data = ["data=files", "data.path='~/corpus'", "data.cache_dir='~/cache'", "data.val_fraction=0.2"]
    assert main(["prepare", *small, *data]) == 0
    (tokenizer,) = (home / "cache").glob("*/tokenizer.json")
    tokenizer.rename(home / "tokenizer.json")
    assert main(["prepare", *small, *data, "data.tokenizer='~/tokenizer.json'"]) == 0
    assert main(["describe", "tiny", "parallel.pp=2", "--picture", "~/step.svg"]) == 0
    assert (home / "step.svg").exists()
    capsys.readouterr()
    absent = [
        (["inspect", "~/run"], f"{home}/run: no checkpoint"),
        (["timeline", "~/run"], f"{home}/run: no timeline"),
        (["generate", "~/run", "--prompt", "a"], f"{home}/run: no weights"),
        (["export", "~/run", "~/out"], f"{home}/run: no weights"),
        (["train", "init_from='~/run'"], f"{home}/run: no weights"),
        (["gqa-study", "init_from='~/run'"], f"{home}/run: no weights"),
    ]
    for command, said in absent:
        assert main(command) == 2 and said in capsys.readouterr().err, command
    (home / "file").touch()
    assert main(["train", "hydra.run.dir='~/file/run'", "resume='~/run'"]) == 2
    assert f"hydra.run.dir={home}/file/run: {home}/file: not a folder" in capsys.readouterr().err
    assert os.listdir(home.parent / "here") == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", "name=../../evil"], ["name=../../evil: has a / in it and begins with ."]),
        (["train", "name="], ["name='': is empty"]),
        (["describe", "name='a/b'"], ["name=a/b: has a / in it"]),
        (
            ["train", f"hydra.run.dir=runs/{'x' * 300}", "data.tokenizer='~no-one/t'", "data.cache_dir=' '"],
            ["hydra.run.dir=runs/xxx", "data.tokenizer=~no-one/t: no user no-one", "data.cache_dir=' ': names no file"],
        ),
        (["train", f"name={'x' * 300}", "optimizer.lr=-1"], ["name=xxx", "optimizer.lr=-1.0"]),
        (["train", f"resume={'x' * 300}"], ["resume=xxx"]),
        (["train", "resume='~no-one/run'"], ["resume=~no-one/run: no user no-one is known here"]),
        (["train", "data=files", f"data.path={'x' * 300}"], ["data.path=xxx"]),
        (["train", "init_from='~no-one/run'"], ["init_from=~no-one/run: no user no-one"]),
        (["gqa-study", "study.dir=' '"], ["study.dir=' ': names no file"]),
        (["inspect", "x", "~no-one/a"], ["PATH=~no-one/a: no user no-one"]),
        (["generate", "", "--prompt", "a"], ["SOURCE='': names no file"]),
        (["generate", "x", "--prompt", "a", "--prompt", "b\udcff"], ["--prompt=b\\udcff: is not UTF-8"]),
        (["export", "x" * 256, "y\udce9"], ["SOURCE=xxx", "OUT=y\\udce9: is not UTF-8"]),
        (["import", "x", "a/" * 2048], ["OUT=a/a/"]),
        (["regroup", "x", "~no-one/a", "--kv-heads", "1"], ["OUT=~no-one/a: no user"]),
        (["timeline", "x", "--out", "~no-one/a.svg"], ["--out=~no-one/a.svg: no user"]),
        (["describe", "tiny", "--picture", ""], ["--picture='': names no file"]),
        (["bench", "kernels", "--out", " "], ["--out=' ': names no file"]),
    ],
    ids=lambda given: " ".join(given)[:40],
)
def test_paths_and_names_that_cannot_be_are_refused_by_key(command, said, home, capsys):
    assert main(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said) and all("would work" in line for line in lines if "lr=" not in line), lines
    for line, begins in zip(sorted(lines), sorted(said), strict=True):
        assert line.startswith(begins), lines
    assert os.listdir(home.parent / "here") == []


def test_one_of_the_ranks_of_a_launcher_says_what_cannot_be(monkeypatch, capsys):
    for rank, others, lines in (("0", True, 1), ("3", False, 1), ("3", True, 0)):
        monkeypatch.setenv("RANK", rank)
        for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "4") if others else monkeypatch.delenv(name, raising=False)
        assert main(["generate", "~no-one/run", "--prompt", "a"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_a_mistyped_word_is_said_with_what_it_may_have_been(capsys):
    for command, said in [
        (["trian"], "trian: no such verb; did you mean train? deepnarrow has train, launch,"),
        (["model=7b"], "model=7b: an override stands behind a verb; deepnarrow train model=7b would work"),
        (["--verison"], "--verison: no such option; did you mean --version?"),
        (["xyz"], "xyz: no such verb; deepnarrow has train,"),
        ([], "no verb; deepnarrow has train,"),
    ]:
        assert main(command) == 2
        assert capsys.readouterr().err.startswith(said)
    for command, said in [
        (["generate", "x", "--prompt", "a", "--temprature=0"], "--temprature=0: no such option; did you mean --temper"),
        (["describe", "tiny", "--jsn"], "--jsn: no such option; did you mean --json?"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            main(command)
        assert said in capsys.readouterr().err


def test_the_versions_are_those_of_what_is_installed(capsys):
    import torch

    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    said = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert [*said] == ["deepnarrow", "commit", "torch", "deepspeed", "python"]
    assert said["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # wheels leave +cu130 out of one
    assert said["python"] == sys.version.split()[0]


COMPLETES = """
source "$1"
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$LINE" COMP_POINT=${#LINE} COMPREPLY=()
_shtab_deepnarrow deepnarrow "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["deepnarrow", "gen"], ["generate"]),
        (["deepnarrow", "generate", "--te"], ["--temperature"]),
        (["deepnarrow", "export", "--dtype", "b"], ["bfloat16"]),
        (["deepnarrow", "inspect", "conf/va"], ["conf/validate.py"]),
        (["deepnarrow", "train", "--config-dir", "conf/sch"], ["conf/schedule"]),
        (["deepnarrow", "train", "model", "=", "6"], ["67b"]),  # what a bash makes of model=6
        (["deepnarrow", "prepare", "data", "=", ""], sorted(p.stem for p in (ROOT / "conf/data").glob("*.yaml"))),
        (["deepnarrow", "describe", "model", "=", "7b", "parallel.p"], ["parallel.pp="]),
    ],
    ids=" ".join,
)
def test_bash_completes_verbs_options_files_presets_and_keys(words, found, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--completion", "bash"])
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    line = " ".join(words).replace(" = ", "=")
    ran = subprocess.run(
        ["bash", "-c", COMPLETES, "bash", tmp_path / "completion", *words],
        **{"env": {**os.environ, "LINE": line}, "cwd": ROOT, "capture_output": True, "text": True},
    )
    assert sorted(ran.stdout.split()) == found, ran.stderr


def test_zsh_is_given_a_script_of_its_own(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--completion", "zsh"])
    said = capsys.readouterr().out
    assert said.startswith("#compdef deepnarrow") and "model=67b" in said and "parallel.pp=" in said
