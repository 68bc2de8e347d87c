import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import ray_nodes
from launch.cli import main
from train.data.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster(tmp_path_factory):
    """A cluster of two nodes in processes of this machine; its address."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made.address
    made.shutdown()


@pytest.mark.launch
def test_every_node_takes_part(cluster, tmp_path, capfd):
    train_tokenizer(iter(["document number"] * 9), 300).save(str(tmp_path / "tokenizer.json"))
    lines = (json.dumps({"text": f"document {i} " * 40}) for i in range(400))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = [f"data.path={tmp_path}/a.jsonl", f"data.tokenizer={tmp_path}", "data.val_fraction=0.1"]
    given = ["model=tiny", "data=files", *data, f"data.cache_dir={tmp_path}/cache"]
    assert main(["prepare", "--ray", cluster, *given]) == 0
    said = capfd.readouterr()
    assert "training and" in said.out and said.out.count("tokenizer: ") == 1
    (folder,) = (tmp_path / "cache").glob("*/meta.json")
    assert main(["prepare", "--ray", cluster, *given, "data.path=/nowhere"]) == 2
    said = capfd.readouterr()
    assert said.err.count("data.path=/nowhere: ") == 2 and all(
        line.startswith("node ") for line in said.err.splitlines()
    )
    assert folder.exists()


def test_without_ray_or_a_cluster_it_says_so(tmp_path):
    hidden = tmp_path / "ray"
    hidden.mkdir()
    (hidden / "__init__.py").write_text("raise ImportError('hidden')")
    code = "import sys; from launch.cli import main; sys.exit(main(['prepare', '--ray', 'auto', 'model=tiny']))"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "--ray=auto: Ray is not installed here; pip install 'deepnarrow[ray]' would work\n"


def test_relative_paths_are_those_of_where_the_command_was_given(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    on_a_node = ray_nodes._task()
    monkeypatch.chdir("/")  # as a worker of Ray is elsewhere
    code, _, said = on_a_node(["model=tiny", "data=files", "data.path=a.jsonl", "data.tokenizer=no.json"], 1)
    assert code == 2 and "data.tokenizer=no.json" in said and "data.path=a.jsonl: no such" not in said
