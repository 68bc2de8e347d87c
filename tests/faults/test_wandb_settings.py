"""Names, tags, ids and variables that W&B would refuse, before any process is started, and where W&B is used alone."""

import os
import subprocess
import sys

import pytest

from launch import cli
from tests.ranks import ROOT


def of_wandb(capfd, tmp_path, *overrides):
    """The lines of a run that its W&B settings alone keep from starting."""
    assert cli.main(["train", *overrides, "parallel.pp=0", f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    lines = said.splitlines()
    assert lines[0].startswith("parallel.pp=0")
    return lines[1:]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["wandb.project=a/b"], ["wandb.project=a/b: has '/' in it", "wandb.entity=a wandb.project=b"]),
        (["wandb.project='a?#%:b'"], ["wandb.project=a?#%:b: ", "wandb.project=a----b would work"]),
        (["wandb.project="], ["wandb.project='': is empty"]),
        ([f"wandb.project={'p' * 129}"], ["has 129 characters, and W&B takes 128"]),
        (["wandb.entity='my team'"], ["wandb.entity=my team: has ' ' in it", "wandb.entity=my-team would work"]),
        (["wandb.entity="], ["wandb.entity='': is empty; null"]),
        (["wandb.tags=['']"], ["wandb.tags=['']: this tag is empty"]),
        ([f"wandb.tags=[ok,{'t' * 65}]"], ["this tag has 65 characters; 1 to 64 characters would work"]),
        ([f"name={'n' * 129}"], ["name=nnn", "has 129 characters, and W&B takes 128"]),
    ],
)
def test_names_that_wandb_would_refuse(overrides, said, capfd, tmp_path):
    (line,) = of_wandb(capfd, tmp_path, *overrides, "wandb.mode=offline")
    assert all(part in line for part in said), line
    assert of_wandb(capfd, tmp_path, *overrides, "wandb.mode=disabled") == []


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WANDB_INIT_TIMEOUT": "abc"}, ["WANDB_INIT_TIMEOUT=abc: W&B says: input should be a valid number"]),
        ({"WANDB_MODE": "bogus"}, ["WANDB_MODE=bogus: not a mode", "online, offline or disabled would work"]),
        ({"WANDB_SILENT": "maybe"}, ["WANDB_SILENT=maybe: ", "unsetting it, would work"]),
        ({"WANDB_HTTP_TIMEOUT": ""}, ["WANDB_HTTP_TIMEOUT=: "]),
        ({"WANDB__SERVICE_WAIT": "x"}, ["WANDB__SERVICE_WAIT=x: "]),
        ({"WANDB_BASE_URL": "nowhere"}, ["WANDB_BASE_URL=nowhere: W&B says: input should be a valid URL"]),
        ({"WANDB_API_KEY": " secret"}, ["WANDB_API_KEY=…: W&B says: API key cannot start"]),
        ({"WANDB_TAGS": "a,,b"}, ["WANDB_TAGS=a,,b: W&B says: tag at index 1 is empty"]),
        ({"WANDB_RUN_ID": "a/b"}, ["WANDB_RUN_ID=a/b: W&B says: run ID cannot contain"]),
        ({"WANDB_DIR": f"{__file__}/w"}, [f"WANDB_DIR={__file__}/w: {__file__}: not a folder"]),
        ({"WANDB_CACHE_DIR": f"{__file__}/w"}, ["WANDB_CACHE_DIR=", "not a folder"]),
    ],
)
def test_variables_that_wandb_could_not_read(variables, said, capfd, tmp_path, monkeypatch):
    for key, value in {"WANDB_MODE": "", **variables}.items():
        monkeypatch.setenv(key, value)
    (line,) = of_wandb(capfd, tmp_path)
    assert all(part in line for part in said) and "secret" not in line, line
    assert of_wandb(capfd, tmp_path, "wandb.mode=disabled") == []


@pytest.mark.parametrize("name", ["id", "run-id"])
def test_an_id_that_wandb_would_refuse_is_that_of_a_file(name, capfd, tmp_path):
    (tmp_path / "run" / "wandb").mkdir(parents=True)
    (tmp_path / "run" / "wandb" / name).write_text("a/b\n")
    (line,) = of_wandb(capfd, tmp_path, "wandb.mode=offline")
    assert line.startswith(f"{tmp_path / 'run' / 'wandb' / name}: a/b: W&B says: run ID cannot contain")


def test_wandb_is_not_imported_where_it_is_disabled_or_as_it_comes(tmp_path):
    script = (
        "import sys; from launch import cli; sys.argv[1:]; code = cli.main(sys.argv[1:]); "
        "sys.exit(3 if 'wandb' in sys.modules else code)"
    )
    asked = ["train", "parallel.pp=0", f"hydra.run.dir={tmp_path / 'run'}", "wandb.mode=disabled", "wandb.project=a/b"]
    environment = {**os.environ, "WANDB_INIT_TIMEOUT": "abc"}
    result = subprocess.run(
        [sys.executable, "-c", script, *asked], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2, result.stderr
