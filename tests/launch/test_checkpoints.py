"""`deepnarrow inspect` and `deepnarrow bench checkpoint`."""

import json

import pytest

from launch.cli import main
from tests.ranks import run_ranks
from tests.train.checkpoint import runs


@pytest.fixture(scope="module")
def run_dir(overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected")
    runs.finish(folder, 2, *overrides, "parallel.pp=2", "train.max_steps=4")
    return folder


@pytest.mark.launch
def test_inspect_tells_what_is_in_every_checkpoint_of_a_run(run_dir, capsys):
    assert main(["inspect", str(run_dir), "--json"]) == 0
    newest, older = json.loads(capsys.readouterr().out)
    assert (newest["step"], older["step"]) == (4, 2) and newest["sound"] and older["sound"]
    assert newest["tokens"] == 4 * 8 * 32
    assert newest["layout"] == {"dp": 1, "pp": 2, "tp": 1, "sequence_parallel": False}
    assert newest["parameters"] == 62752 and newest["model"]["n_kv_heads"] == 2
    assert newest["bytes"] == sum(
        path.stat().st_size for path in runs.saved(run_dir, 4).iterdir() if path.name != "manifest.json"
    )
    assert main(["inspect", str(run_dir / "checkpoints" / "latest")]) == 0
    said = capsys.readouterr().out
    assert "step     4, 1,024 tokens" in said and "dp1 x pp2 x tp1" in said and "sound    yes" in said


@pytest.mark.launch
def test_inspect_finds_damage(run_dir, capsys):
    file = runs.saved(run_dir, 2) / "rank00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["inspect", str(run_dir)]) == 1
    said = capsys.readouterr().out
    assert said.count("sound    yes") == 1 and "sound    NO: rank00001.safetensors was changed" in said
    (runs.saved(run_dir, 2) / "manifest.json").unlink()
    assert main(["inspect", str(runs.saved(run_dir, 2))]) == 1
    assert "NO: manifest.json: No such file" in capsys.readouterr().out


def test_inspect_of_nothing_is_bad_input(tmp_path, capsys):
    (tmp_path / "step-00000004").symlink_to("gone")
    for path in (tmp_path, tmp_path / "gone", tmp_path / "step-00000004"):
        assert main(["inspect", str(path)]) == 2
        assert f"{path}: no checkpoint is there" in capsys.readouterr().err


@pytest.mark.launch
def test_the_benchmark_measures_both_kinds_of_save(tmp_path):
    (found,) = run_ranks("tests.launch.small_bench", 1, tmp_path)
    assert found["parameters"] == 3_016_832
    assert 12 <= found["bytes_per_parameter"] < 12.1
    assert 0 < found["seconds"]["blocked"] < found["seconds"]["written"]
    assert found["blocked_share"] == found["seconds"]["blocked"] / found["seconds"]["waited"]
    assert not list(tmp_path.glob("bench-*"))
