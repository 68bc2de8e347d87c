"""The examples, typed as their pages say, on smaller settings: what comes out, and that nothing has drifted.

In the place of DeepSpeed's launcher ranks are forked from the tests' process; all else is what `deepnarrow` does.
"""

import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
import yaml
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.compose import compose_overrides
from launch import cli
from launch.cluster import printed
from tests.docs_blocks import blocks_of, missing_lines, taken_apart, with_settings
from tests.ranks import ROOT
from tests.test_docs_run import launched
from tests.train.checkpoint import runs
from train.checkpoint import manifest

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "attention" / "attention.ipynb"
SHORT = ["train.max_steps=2", "train.val_sequences=4", "wandb.mode=disabled", "sample.tokens=0", "train.timeline_at=[]"]


class Place:
    """A folder with the examples in it, in which the commands of their pages are typed."""

    def __init__(self, folder, patch):
        self.folder, self.patch = folder, patch
        (folder / "examples").symlink_to(EXAMPLES)
        patch.chdir(folder)
        patch.setenv("DEEPNARROW_CACHE", str(folder / "cache"))
        patch.setattr("launch.supervise.launch", launched)

    def type_all(self, example, settings, refused=None):
        """Run all commands of a page, of which those with `refused` in them end with 2; what each printed, in order."""
        said = []
        for block in blocks_of(EXAMPLES / example / "README.md"):
            for command in block.commands():
                words, _ = taken_apart(command.text)
                more = next((given for begin, given in settings.items() if command.text.startswith(begin)), [])
                with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
                    code = self.run(words, more)
                said.append(out.getvalue() or errors.getvalue())
                expected = 2 if refused and refused in command.text else 0
                assert code == expected, f"exit code {code}: $ {command.text}\n{said[-1]}\n{errors.getvalue()}"
        return said

    def run(self, words, settings):
        if words[0] == "python":
            self.patch.setattr(sys, "argv", [*words[1:], *settings])
            return runpy.run_path(words[1], run_name="__main__") and 0
        assert words[0] == "deepnarrow"
        return cli.main(with_settings(words[1:], settings))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield Place(tmp_path_factory.mktemp("examples"), patch)


@pytest.fixture(scope="module")
def shape(place, corpus):
    """What the page about a shape prints, and its run."""
    few = ["data=files", f"data.path={corpus}/a*.py", "data.val_fraction=0.2"]
    said = place.type_all("shape", {"deepnarrow train": [*SHORT, *few, "hydra.run.dir=runs/shape"]})
    return said, place.folder / "runs" / "shape"


@pytest.fixture(scope="module")
def gqa(place):
    """What the page about a conversion prints."""
    uptrain = [*SHORT, "train.max_steps=12", "checkpoint.every_steps=12"]
    return place.type_all("gqa", {"python examples/gqa/make_mha.py": ["24"], "deepnarrow train": uptrain})


def shown(example):
    """The lines of output that a page shows."""
    (block,) = [block for block in blocks_of(EXAMPLES / example / "README.md") if block.kind == "text"]
    return block.text.splitlines()


def test_each_example_has_a_page_and_is_listed():
    listed = (ROOT / "docs" / "examples.md").read_text("utf-8")
    folders = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__")
    assert re.findall(r"^\| `examples/(\w+)/`", listed, re.M) and len(folders) == 5
    assert sorted(re.findall(r"^\| `examples/(\w+)/`", listed, re.M)) == folders
    assert all((EXAMPLES / name / "README.md").is_file() for name in folders)


@pytest.mark.launch
def test_a_shape_of_ones_own_is_described_and_trained(shape):
    (described, _), run_dir = shape
    given = yaml.safe_load((EXAMPLES / "shape" / "model" / "24x96.yaml").read_text())
    assert described.startswith("24x96: 24 layers, d_model 96, 6 query and 2 key/value heads of 16 (GQA-2)")
    assert "2 pipeline stages" in described
    config = manifest.read(runs.saved(run_dir, 2)).config
    assert {key: config["model"][key] for key in given["model"]} == given["model"]
    assert config["train"]["global_batch"] == given["train"]["global_batch"]
    assert json.loads((run_dir / "summary.json").read_text())["complete"]


@pytest.mark.launch
def test_three_sources_are_mixed_by_weight_and_the_last_stage_has_two_of_them(place):
    stages = "data.stages=[{until: 4096}, {until: 8192, weights: {docstrings: 1, manual: 1}}]"
    short = [*SHORT, stages, "train.total_tokens=8192", "train.max_steps=null", "schedule.warmup_steps=2"]
    short += ["train.val_sequences=20"]
    wrote, prepared, _, refused = place.type_all("mixture", {"deepnarrow train": short}, "max_epochs=0.1")
    assert {path.name for path in Path("raw").iterdir()} == {"code.jsonl", "docstrings.parquet", "manual.jsonl.gz"}
    assert re.match(r"raw: \d+ files of code, \d+ docstrings, \d+ topics of the manual\n", wrote)
    assert missing_lines(shown("mixture"), prepared) == []
    taken = dict(re.findall(r"^(\w+) +([\d,]+) tokens, ", prepared, re.M))
    code, docstrings, manual = (int(taken[name].replace(",", "")) for name in ("code", "docstrings", "manual"))
    # 0.6, 0.25 and 0.15 of 1.2e5 tokens, then half of 4e4 for each of two, to a sequence or two and a step
    assert (code, docstrings, manual) == pytest.approx((72e3, 50e3, 38e3), abs=1500)
    assert refused.startswith("data.sources.manual.max_epochs=0.1: ")
    records = [one["source_tokens"] for one in runs.metrics(Path("runs/three-sources")) if one["step"]]
    assert records[3]["code"] == records[7]["code"] == pytest.approx(0.6 * 4096, abs=128)
    assert records[7]["manual"] - records[3]["manual"] == 2048
    assert set(runs.metrics(Path("runs/three-sources"))[-1]["val_sets"]) == {"code", "docstrings", "manual"}


@pytest.mark.launch
def test_a_hugging_face_directory_is_converted_trained_on_and_loaded_again(gqa):
    *_, exported, compared = gqa
    assert missing_lines(shown("gqa"), compared) == []
    _, converted, uptrained = (float(loss) for loss in re.findall(r"loss ([\d.]+)$", compared, re.M))
    assert uptrained < converted
    assert "its logits are those of the source" in exported
    validated = runs.metrics(Path("runs/gqa2-uptrained"))
    assert validated[0]["step"] == 0 and validated[0]["val_loss"] > validated[-1]["val_loss"]
    for folder, kv_heads in (("gqa/mha", 8), ("gqa/converted", 2), ("gqa/uptrained", 2)):
        there = json.loads(Path(folder, "config.json").read_text())
        assert there["architectures"] == ["LlamaForCausalLM"] and there["num_key_value_heads"] == kv_heads
        assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"


def executed(run, then):
    """The notebook, executed on a run in a process of its own, as Jupyter does it, with a last cell of ours."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (which,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    which.source, replaced = re.subn(r'^run = ".*"$', f"run = {str(run)!r}", which.source, flags=re.M)
    assert replaced == 1
    notebook.cells.append(nbformat.v4.new_code_cell(then))
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": Path.cwd()}}).execute()
    return notebook


def text_of(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}  # no warnings
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.mark.launch
def test_the_notebook_has_the_attention_that_transformers_has(shape, place):
    found = executed(shape[1], "torch.save((ids, maps, within, across), 'attention.pt')")
    said = text_of(found)
    assert sum("image/png" in output.get("data", {}) for cell in found.cells for output in cell.get("outputs", [])) == 2
    assert said.startswith("24 layers, 6 query heads on 2 key/value heads (GQA-2); a text of ")
    assert said.count("overlap within groups 0.") == 24 and "cache: 1,536 numbers a token, 4,608 if" in said
    ids, maps, within, across = torch.load("attention.pt")
    assert cli.main(["export", str(shape[1]), "shape-hf"]) == 0
    model = AutoModelForCausalLM.from_pretrained("shape-hf", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        theirs = model(torch.tensor([ids]), output_attentions=True).attentions
    for ours_HLL, theirs_BHLL in zip(maps, theirs, strict=True):
        torch.testing.assert_close(ours_HLL, theirs_BHLL[0], rtol=1e-4, atol=1e-5)
    assert len(ids) > 64  # more than the windows of two layers in three, which hide something
    assert maps[0][:, -1, 0].max() == 0 < maps[2][:, -1, 0].min()
    # heads 0 to 2 are a group, 3 to 5 the other
    seen_HLL = maps[5][:, 8:]
    pairs = {(a, b): torch.minimum(seen_HLL[a], seen_HLL[b]).sum(-1).mean() for a in range(6) for b in range(a)}
    assert within[5] == pytest.approx(sum(float(v) for (a, b), v in pairs.items() if a // 3 == b // 3) / 6, abs=1e-5)
    assert across[5] == pytest.approx(sum(float(v) for (a, b), v in pairs.items() if a // 3 != b // 3) / 9, abs=1e-5)


@pytest.mark.launch
@pytest.mark.filterwarnings("ignore:FigureCanvasAgg")
def test_the_notebook_takes_a_directory_without_groups(gqa, capsys, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    names = {}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            exec(re.sub(r'^run = ".*"$', 'run = "gqa/mha"', cell.source, flags=re.M), names)
    said = capsys.readouterr().out
    assert said.startswith("4 layers, 8 query heads on 8 key/value heads (MHA); a text of ")
    assert "there are no groups to compare\n" in said and said.count("overlap within groups nan, across groups 0.") == 4


def test_the_outputs_in_the_notebook_are_whole_small_and_of_nobody():
    written = NOTEBOOK.read_text("utf-8")
    code = [cell for cell in nbformat.reads(written, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) == 2
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
    assert len(written) < 400_000 and not re.search(r"/(?:home|root|work|tmp|Users)/", written)


def commands_of(script):
    """The lines of a script that are no comment for people, without empty ones."""
    return [line for line in script.splitlines() if line and (not line.startswith("#") or line.startswith("#SBATCH"))]


@pytest.fixture
def played(tmp_path, monkeypatch):
    """Run a script of the example with a Python and Slurm's commands that write down what they are told."""

    def run(name, python=""):
        root = tmp_path / "deepnarrow"
        bin_ = root / ".venv" / "bin"
        bin_.mkdir(parents=True, exist_ok=True)
        told = f'printf "%s\\n" "$DEEPNARROW_CACHE" "$@" > {tmp_path}/told\n'
        for path, text in {
            bin_ / "python": f"{told}{python}",
            bin_ / "srun": 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',
            bin_ / "scontrol": f'echo "$@" > {tmp_path}/queued\n',
        }.items():
            path.write_text(f"#!/bin/bash\n{text}")
            path.chmod(0o755)
        script = (EXAMPLES / "slurm" / name).read_text().replace("/shared/deepnarrow", str(root))
        environment = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        ran = subprocess.run(["bash"], input=script, env=environment, text=True, timeout=60)
        queued = tmp_path / "queued"
        asked = queued.read_text() if queued.exists() else ""
        queued.unlink(missing_ok=True)
        return ran.returncode, (tmp_path / "told").read_text().splitlines(), asked

    return run


def test_the_job_of_slurm_is_what_the_command_prints_and_what_a_cluster_wants_besides(capsys, monkeypatch, played):
    (block,) = [block for block in blocks_of(EXAMPLES / "slurm" / "README.md") if "--print" in block.text]
    (command,) = block.commands()
    monkeypatch.setattr(sys, "executable", "/shared/deepnarrow/.venv/bin/python")
    monkeypatch.setattr(printed.os, "getcwd", lambda: "/shared/deepnarrow")
    assert cli.main(shlex.split(command.text)[1:]) == 0
    expected = commands_of(capsys.readouterr().out)
    ours = commands_of((EXAMPLES / "slurm" / "train.sh").read_text())
    assert [line for line in expected if line not in ours] == []
    besides = list(ours)
    for line in expected:
        besides.remove(line)
    assert [line for line in ours if line not in besides] == expected
    assert [line.partition("=")[0] for line in besides] == [
        *["#SBATCH --partition", "#SBATCH --account", "#SBATCH --time"],
        *["export DEEPNARROW_CACHE", "export NCCL_SOCKET_IFNAME"],
    ]


def test_the_jobs_of_slurm_prepare_and_train_the_same_and_the_second_is_queued_again(played):
    code, prepares, _ = played("prepare.sh")
    assert code == 0 and prepares[:4] == ["/shared/cache", "-m", "deepnarrow", "prepare"]
    told = "trap 'sleep 0.3; exit 0' USR1\nkill -USR1 $PPID; sleep 60 & wait\n"  # as a run that saves, not at once
    code, trains, queued = played("train.sh", told)
    assert (code, queued) == (0, "requeue 7\n")
    assert trains[:6] == ["/shared/cache", "-m", "deepnarrow", "launch", "--gpus-per-node", "8"]
    assert prepares[4:] == trains[6:]
    config = compose_overrides(trains[6:]).config
    assert config.data.path == "/shared/corpus/*.jsonl.zst" and config.name == "7b-corpus"
    assert played("train.sh", "exit 3\n")[::2] == (3, "")
