"""A command line that cannot mean what it says, and configurations of a user's own: before any process is started."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf.compose import compose_overrides
from conf.schema import recipe_fields
from launch import cli, supervise
from tests.ranks import ROOT
from train import like, loop, pretrain

PRETRAIN = str(ROOT / "train" / "pretrain.py")
SMALL = """
model: {n_layers: 4, d_model: 32, n_heads: 4, n_kv_heads: 2, d_ff: 64, vocab_size: 400, max_seq_len: 64, init_std: 0.05}
train: {seq_len: 32, global_batch: 8, micro_batch: 2, max_steps: 3}
sample: {tokens: 0}
wandb: {mode: disabled}
"""
FAST = """
# @package _global_
defaults:
  - override /schedule: cosine
train: {max_steps: 2}
"""


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """What would be started; no process is."""
    launches = []
    monkeypatch.setattr(supervise, "launch", lambda *arguments: launches.append(arguments) or 0)
    return launches


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of a user's own YAML; its name has a space."""
    folder = tmp_path_factory.mktemp("of mine")
    (folder / "experiment").mkdir()
    (folder / "model").mkdir()
    (folder / "small.yaml").write_text(SMALL)
    (folder / "listed.yaml").write_text(f"defaults: [config, {{override data: files}}, _self_]\n{SMALL}")
    (folder / "alone.yaml").write_text("defaults: [{model: tiny}]\n")
    (folder / "broken.yaml").write_text("train: {max_steps: 2\n")
    (folder / "list.yaml").write_text("[1, 2]\n")
    (folder / "unknown.yaml").write_text("train: {max_step: 2}\n")
    (folder / "experiment" / "fast.yaml").write_text(FAST)
    (folder / "experiment" / "wrong.yaml").write_text("# @package _global_\ntrain: {max_step: 2}\n")
    for bare in ("experiment", "model"):
        (folder / bare / "bare.yaml").write_text("train: {max_steps: 2}\n")
    (folder / "experiment" / "slow_decay.yaml").write_text("defaults: [{override /schedule: cosine}]\n")
    (folder / "model" / "7b.yaml").write_text("# @package _global_\npreset: mine\nmodel: {n_layers: 9}\n")
    return folder


@pytest.fixture(scope="module")
def data(corpus, tmp_path_factory):
    """Overrides of a corpus of a few files, in a cache of its own."""
    folder = tmp_path_factory.mktemp("few")
    for path in sorted(corpus.iterdir(), key=lambda path: path.stat().st_size)[8:16]:
        (folder / path.name).write_bytes(path.read_bytes())
    cache = tmp_path_factory.mktemp("cache")
    return ["data=files", f"data.path={folder}", "data.val_fraction=0.3", f"data.cache_dir={cache}"]


@pytest.fixture(scope="module")
def trained(own, data, tmp_path_factory):
    """A run of a user's own configuration, one process, with a path that is relative to where it was started."""
    where = tmp_path_factory.mktemp("started")
    (where / "corpus").symlink_to(data[1].partition("=")[2])
    given = [data[0], "data.path=corpus", *data[2:], "+experiment=fast", "name=mine"]
    command = [sys.executable, PRETRAIN, "--config-dir", str(own), "-cn", "small", *given]
    result = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return where / "runs" / "mine"


def bad(capfd, *arguments):
    """The lines of a command that ends with 2."""
    assert cli.main(list(arguments)) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()


def described(capfd, *arguments):
    assert cli.main(["describe", *arguments, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


# Options that say where a configuration comes from.


def test_a_run_of_ones_own_configuration_is_what_the_options_say(trained, own):
    written = OmegaConf.load(trained / ".hydra" / "config.yaml")
    assert (written.model.n_layers, written.train.max_steps, written.schedule.decay) == (4, 2, "cosine")
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 2
    of_hydra = OmegaConf.load(trained / ".hydra" / "hydra.yaml").hydra
    assert of_hydra.job.config_name == "small"
    assert [source.path for source in of_hydra.runtime.config_sources if source.provider == "command-line"] == [
        str(own)
    ]


@pytest.mark.parametrize("name", ["small", "listed.yaml"])
def test_the_options_reach_every_verb_and_the_ranks(name, own, data, started, tmp_path, capfd, monkeypatch):
    where = ["--config-dir", str(own), "-cn", name]
    given = [*where, *data, "+experiment=fast", f"hydra.run.dir={tmp_path / 'run'}"]
    assert described(capfd, *where)["stages"][0]["parameters"] < 100_000
    assert cli.main(["prepare", *given]) == 0
    assert cli.main(["train", *given]) == 0
    ((arguments, processes, run_dir, _),) = started
    assert (processes, run_dir) == (1, tmp_path / "run")
    runs = []
    monkeypatch.setattr(loop, "train", lambda prepared, signals, rendezvous: runs.append(prepared))
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_SIZE", "1")):
        monkeypatch.setenv(key, value)
    pretrain.main(arguments)
    assert (runs[0].config.model.n_layers, runs[0].config.train.max_steps) == (4, 2)
    assert runs[0].config.schedule.decay.name == "cosine"
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", [])
    assert cli.main(["train", *given, "--cfg", "job"]) == 0
    shown = OmegaConf.create(capfd.readouterr().out)
    assert (shown.model.n_layers, shown.train.max_steps, shown.schedule.decay) == (4, 2, "cosine")


def test_a_file_of_ones_own_goes_before_the_packages_of_the_same_name(own, tmp_path):
    assert compose_overrides([f"--config-dir={own}", "model=7b"]).config.model.n_layers == 9
    (tmp_path / "config.yaml").write_text("defaults: [config, {override model: 7b}, _self_]\ntrain: {max_steps: 7}\n")
    config = compose_overrides(["-cd", str(tmp_path)]).config
    assert (config.preset, config.train.max_steps) == ("7b", 7)
    assert compose_overrides([]).config.train.max_steps is None  # nothing of it is left for the next


VERBS = ["train", "prepare", "describe", "gqa-study", "bench stage"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--config-dir", "no/such"], ["--config-dir=no/such: not there", "a folder with YAML files would work"]),
        (["--config-dir", __file__], [f"--config-dir={__file__}: is a file", f"{Path(__file__).parent} would work"]),
        (["--config-dir="], ["--config-dir=: is empty; a value, or leaving it out, would work"]),
        (["-cn", "none"], ["--config-name=none: no none.yaml in the package's own configs", "--config-dir=DIR"]),
        (["-cn", "none", "-cd", "OWN"], ["--config-name=none: no none.yaml in OWN nor", "--config-name=small"]),
        (["-cn", "OWN/small.yaml"], ["a name inside a folder, not a path", "--config-dir=OWN --config-name=small"]),
        (["-cn", "alone", "-cd", "OWN"], ["--config-name=alone: lacks the package's", "`defaults: [config, _self_]`"]),
        (["-cn", "broken", "-cd", "OWN"], ["--config-name=broken: OWN/broken.yaml", "would work"]),
        (["-cn", "list", "-cd", "OWN"], ["--config-name=list: OWN/list.yaml: is no mapping", "would work"]),
        (["-cn", "unknown", "-cd", "OWN"], ["--config-name=unknown", "max_step"]),
        (["--config-path", "OWN"], ["--config-path=OWN: would leave", "--config-dir=OWN adds"]),
        (["-cd", "OWN", "--config-dir", "else"], ["--config-dir=else: is OWN as well"]),
        (["-cd", "OWN", "+experiment=fats"], ["+experiment=fats: no such preset; did you mean +experiment=fast?"]),
        (["-cd", "OWN", "experiment=fast"], ["experiment=fast: ", "+experiment=fast would work"]),
        (
            ["-cd", "OWN", "+experiment=wrong"],
            ["experiment/wrong.yaml: train.max_step: no such key; did you mean train.max_steps"],
        ),
        (
            ["-cd", "OWN", "+experiment=bare"],
            ["experiment/bare.yaml: ", "of section experiment; `# @package _global_`"],
        ),
        (
            ["-cd", "OWN", "+experiment=slow_decay"],
            ["experiment/slow_decay.yaml: ", "of section experiment; `# @package _global_`"],
        ),
        (["-cd", "OWN", "model=bare"], ["model/bare.yaml: ", "of section model; `# @package _global_`"]),
        (["+experiment=fast"], ["+experiment=fast: no such group", "--config-dir=DIR of a folder with experiment/"]),
        (["hydra.searchpath=[file:///no/such]"], ["hydra.searchpath=[file:///no/such]: /no/such is no folder"]),
        (["--like", "no/such"], ["--like=no/such: no run is there", "would work"]),
    ],
)
def test_what_is_not_there_is_said_by_every_verb(options, said, own, capfd, monkeypatch):
    every = options in (["--config-dir", "no/such"], ["-cn", "none"], ["+experiment=fast"])
    options = [word.replace("OWN", str(own)) for word in options]
    for verb in VERBS if every else VERBS[2:3]:
        (line,) = bad(capfd, *verb.split(), *options)
        assert all(part.replace("OWN", str(own)) in line for part in said), (verb, line)
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit, match="2"):  # Hydra would answer with another configuration, or a traceback
        pretrain.main([*options, "--cfg", "job"])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--multirun", ["--multirun: starts several runs", "for seed in 1 2"]),
        ("-m", ["-m: starts several runs", "would work"]),
        ("--config-nam=x", ["--config-nam=x: not an option here"]),
        ("hydra.mode=MULTIRUN", ["hydra.mode=MULTIRUN: a command is one run"]),
    ],
)
def test_a_command_is_one_run(option, said, capfd):
    (line,) = bad(capfd, "train", "train.seed=1", option)
    assert all(part in line for part in said), line


# A run's settings, taken again.


def test_the_config_of_a_run_folder_composes_that_very_run(trained, capfd, monkeypatch):
    there = ["--config-dir", str(trained / ".hydra"), "-cn", "config"]
    composition = compose_overrides(there)
    written = OmegaConf.load(trained / ".hydra" / "config.yaml")
    assert composition.problems == [] and composition.config.name == "mine"
    assert OmegaConf.to_container(OmegaConf.structured(composition.config), enum_to_str=True) == (
        OmegaConf.to_container(written)
    )
    monkeypatch.setattr(sys, "argv", [])
    assert cli.main(["train", *there, "--cfg", "job"]) == 0
    assert OmegaConf.create(capfd.readouterr().out) == written
    lines = bad(capfd, "describe", *there, "model=7b")
    assert "sets the same keys over it" in lines[0] and f"--like={trained} model=7b" in lines[0]


def test_like_goes_on_with_the_same_recipe_and_is_a_run_of_its_own_with_another(trained, started, capfd):
    def train(*overrides):
        assert cli.main(["train", f"--like={trained}", *overrides]) == 0
        arguments, processes, run_dir, _ = started.pop()
        return compose_overrides(arguments), processes, run_dir, capfd.readouterr().err

    same, processes, run_dir, said = train("train.max_steps=4", "parallel.pp=2")
    assert (run_dir, processes, same.config.name) == (trained, 2, "mine")
    assert (same.config.train.max_steps, same.config.schedule.decay.name) == (4, "cosine")
    assert "taken over: " in said and "+experiment=fast" in said and "the recipe is the same" in said
    other, _, run_dir, said = train("optimizer.lr=1e-3", "schedule=wsd")
    assert other.config.name == run_dir.name != "mine" and other.config.optimizer.lr == 1e-3
    assert other.config.model == same.config.model and other.config.schedule.decay.name == "wsd"
    assert "the recipe is another: optimizer.lr, schedule.decay; its name is left to it (name=mine)" in said
    named, _, run_dir, _ = train("optimizer.lr=1e-3", "name=theirs", "+experiment=fast")
    assert run_dir == Path("runs/theirs") and named.problems == []
    assert cli.main(["train", "--like", str(trained)]) == 0 and not started
    assert "complete, 2 of 2 steps" in capfd.readouterr().err


def test_like_says_for_every_verb_what_it_takes_and_what_has_changed_since(trained, own, capfd, monkeypatch):
    assert described(capfd, "--like", str(trained / "checkpoints" / "latest"))["seq_len"] == 32
    assert described(capfd, f"--like={trained}", "train.seq_len=16", "+experiment=fast")["seq_len"] == 16
    assert cli.main(["prepare", f"--like={trained}", "train.seed=2"]) == 0
    capfd.readouterr()
    lines = bad(capfd, "describe", f"--like={trained}", "7b")
    assert f"{own / 'small.yaml'} sets the same keys over it" in lines[-1]
    lines = bad(capfd, "gqa-study", f"--like={trained}", "study.alpha=0.3")
    assert any(line.startswith("study.alpha=0.3: not one of") for line in lines), lines
    lines = bad(capfd, "bench", "stage", f"--like={trained}", "parallel.pp=9")
    assert "more stages than the 4 layers" in lines[-1]
    assert "is only taken with a subject" in bad(capfd, "bench", f"--like={trained}")[-1]
    (own / "small.yaml").write_text(SMALL.replace("max_seq_len: 64", "max_seq_len: 128"))
    try:
        described(capfd, f"--like={trained}")
        cli.main(["describe", f"--like={trained}"])
        assert "changed since: model.max_seq_len=128 (it had 64)" in capfd.readouterr().err
    finally:
        (own / "small.yaml").write_text(SMALL)


def test_presets_of_a_run_stand_over_those_of_a_verb(data, started, tmp_path, capfd):
    composition = compose_overrides([*data, "train.seq_len=32", "wandb.mode=disabled"])
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save({"hydra": composition.node.hydra}, tmp_path / ".hydra" / "hydra.yaml")
    OmegaConf.save(composition.node.hydra.overrides.task, tmp_path / ".hydra" / "overrides.yaml")
    lines = bad(capfd, "gqa-study", f"--like={tmp_path}", "study.kv_heads=[3]")
    assert "model=tiny" in lines[0]  # not tiny_mha, of which the study is by default
    assert lines[-1].startswith("study.kv_heads=3: does not divide the 2 key/value heads"), lines
    lines = bad(capfd, "bench", "stage", f"--like={tmp_path}", "parallel.pp=9")
    assert any("more stages than the 8 layers" in line for line in lines), lines


def test_like_works_where_the_folder_that_a_run_was_composed_from_is_gone(trained, own, started, capfd):
    away = own.with_name("away")
    own.rename(away)
    try:
        assert cli.main(["train", f"--like={trained}", "optimizer.lr=2e-3"]) == 0
        said = capfd.readouterr().err
        assert f"--config-dir={own}: not there" in said and "its own .hydra/config.yaml is taken" in said
        assert "the recipe is another: optimizer.lr; its name is left to it" in said
        (arguments, _, run_dir, _) = started.pop()
        config = compose_overrides(arguments).config
        assert (config.model.n_layers, config.optimizer.lr, config.name) == (4, 2e-3, run_dir.name)
        lines = bad(capfd, "train", f"--like={trained}", "model=7b")
        assert "model=7b: " in lines[-1] and "sets the same keys over it" in lines[-1]
    finally:
        away.rename(own)


@pytest.mark.parametrize("adds", [[], ["train.seed=7"]])
def test_paths_of_a_mixture_a_url_and_a_home_are_the_same_from_elsewhere(adds, tmp_path, monkeypatch, capfd):
    run, here = tmp_path / "started" / "run", tmp_path / "here"
    for folder in (run / ".hydra", run.parent / "web", here / "web"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(run.parent)
    mixture = "data.sources={web: {path: web}, code: {path: 's3://code'}}"
    composition = compose_overrides([mixture, "data.sources.code.weight=3", "data.tokenizer='~/tokenizer.json'"])
    OmegaConf.save(composition.node.hydra.overrides.task, run / ".hydra" / "overrides.yaml")
    OmegaConf.save(OmegaConf.structured(composition.config), run / ".hydra" / "config.yaml")
    OmegaConf.save({"hydra": {"runtime": {"cwd": str(run.parent)}}}, run / ".hydra" / "hydra.yaml")
    monkeypatch.chdir(here)
    config = compose_overrides(like.take_over([f"--like={run}", *adds], goes_on=True)).config
    paths = {name: source.path for name, source in config.data.sources.items()}
    assert paths == {"web": str(run.parent / "web"), "code": "s3://code"}
    assert config.data.sources["code"].weight == 3
    said = capfd.readouterr().err
    assert ("the recipe is another: train.seed" if adds else "the recipe is the same") in said, said


def test_like_works_out_anew_what_weights_to_begin_with_imply(trained, own, data, started, tmp_path, capfd):
    uptrained = tmp_path / "uptrained"
    begins = [f"init_from={trained}", "uptrain.alpha=0.5", "wandb.mode=disabled", f"hydra.run.dir={uptrained}"]
    given = [f"data.path={data[1].partition('=')[2]}", *data[2:], *begins]
    assert cli.main(["train", *given]) == 0
    arguments, *_ = started.pop()
    first = compose_overrides(arguments)
    (uptrained / ".hydra").mkdir(parents=True)
    for name, node in (("overrides", first.node.hydra.overrides.task), ("config", first.config)):
        OmegaConf.save(OmegaConf.structured(node) if name == "config" else node, uptrained / ".hydra" / f"{name}.yaml")
    capfd.readouterr()
    assert cli.main(["train", f"--like={uptrained}", "uptrain.alpha=1.0"]) == 0
    then = compose_overrides(started.pop()[0])
    assert then.config.train.total_tokens == 2 * first.config.train.total_tokens
    assert then.config.model.n_layers == 4
    kept = recipe_fields(OmegaConf.to_container(OmegaConf.structured(then.config), enum_to_str=True))
    assert kept["data.path"] == first.config.data.path


# What is said of overrides.


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data=files", "data.path=~/x=[a"], ["data.path=~/x=[a: Hydra cannot read this value"]),
        (["init_from=a=b", "uptrain.alpha=0.1"], ["init_from=a=b: Hydra cannot read this value"]),
        (["optimizer.lr=1e-3,1e-4"], ["optimizer.lr=1e-3 ~ would work", "for several runs, a command for each"]),
        (["optimizer.lr=choice(1,2)"], ["several values", "one value would work", "--multirun is not how"]),
        (["train.val_at=1,2"], ["train.val_at=[1,2] would work"]),
        (["data.path=a,b"], ["data.path=a ~ would work", """'data.path="a,b"', as one text"""]),
        (["model=7b,67b"], ["model=7b,67b: several values", "model=7b"]),
        (["+train.seq_len=8"], ["+train.seq_len=8: there is this key already; train.seq_len=8 would work"]),
        (["+schedule=cosine"], ["schedule=cosine would work, without the +"]),
        (["++model=7b"], ["++model=7b: ", "model=7b would work"]),
        (["model@x=7b"], ["model@x=7b: ", "model=7b would work, without the @"]),
        (["/model=7b"], ["/model=7b: model=7b would work"]),
        ([""], ["'': an empty word", "key=value would work"]),
        (["="], ["=: has no key", "key=value would work"]),
        (["=7b"], ["=7b: has no key"]),
        (["+="], ["+=: has no key"]),
        (["~"], ["~: has no key"]),
        (["train.max_steps"], ["train.max_steps: has no value; write key=value"]),
        (["~train.max_steps"], ["settings are not deleted; train.max_steps=null or leaving it out would work"]),
        (["~name"], ["~name: settings are not deleted; leaving it out would work"]),
        (["~schedule=wsd"], ["~schedule would work"]),
        (["schedule.step_at=0.5"], ["must be a list; schedule.step_at=[0.5] would work"]),
        (["train=5"], ["train is a section; train.KEY=value"]),
        (["name=null"], ["name=null: cannot be null"]),
    ],
)
def test_one_override_brings_one_true_line(overrides, said, capfd):
    (line,) = bad(capfd, "train", *overrides)
    parts = [piece for part in said for piece in part.split(" ~")]
    assert all(part in line for part in parts), line


def test_problems_of_a_preset_that_is_none_say_what_they_were_judged_by(capfd):
    lines = bad(capfd, "train", "model=57b", "parallel.pp=9", "wandb.project=a/b", "wandb.mode=offline")
    assert "model=57b: no such preset" in lines[0] and "model=67b" in lines[0]
    assert lines[1].startswith("parallel.pp=9: more stages") and lines[1].endswith("(judged with model=tiny)")
    assert lines[2].startswith("wandb.project=a/b: ") and "judged" not in lines[2]
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["~model.n_layers"], "~model.n_layers: settings are not deleted"),
        (["train.seq_len"], "train.seq_len: has no value"),
        (["57b"], "model=57b: no such preset; did you mean model=7b"),
        (["7b", "67b"], "model=7b model=67b: one model is described at a time"),
        ([""], "'': an empty word"),
        (["=7b"], "=7b: has no key"),
    ],
)
def test_describe_takes_a_bare_word_for_a_preset_and_nothing_else(words, said, capfd):
    (line,) = bad(capfd, "describe", *words)
    assert line.startswith(said), line


def test_describe_leaves_a_choice_out_and_takes_the_shape_of_weights_to_begin_with(trained, capfd):
    assert described(capfd, "~schedule", "model.n_layers=4")["preset"] == "tiny"
    found = described(capfd, f"init_from={trained}", "train.seq_len=32", "parallel.pp=2")
    assert found["attention"] == "GQA-2" and len(found["stages"]) == 2
    assert found["parameters"] == described(capfd, f"--config-dir={trained / '.hydra'}")["parameters"]
    assert cli.main(["describe", f"init_from={trained}", "train.seq_len=32"]) == 0
    assert f"{trained}: 4 layers, d_model 32" in capfd.readouterr().out.replace("\n", "")
    (line,) = bad(capfd, "describe", f"init_from={trained}", "train.seq_len=32", "model.n_layers=5")
    assert line.startswith("model.n_layers=5: the weights of init_from=") and "model.n_layers=4 would work" in line
    (line,) = bad(capfd, "bench", "stage", f"init_from={trained}", "train.seq_len=32", "model.d_ff=65")
    assert line.startswith("model.d_ff=65: the weights of init_from=")


def test_what_wandb_is_told_otherwise_is_said(own, data, tmp_path, monkeypatch):
    from train.preflight import preflight

    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    where = [f"--config-dir={own}", "--config-name=small", *data, f"hydra.run.dir={tmp_path}"]
    found = preflight([*where, "wandb.mode=offline"]).warnings
    assert "WANDB_PROJECT is set and not used: wandb.project says it" in found
    assert not any("WANDB" in line for line in preflight(where).warnings)
