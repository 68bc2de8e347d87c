"""A run as Hydra's job: its files, its log and its environment, from one composition."""

import logging
import os
from datetime import timedelta

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf

from conf.compose import compose_overrides
from conf.job import run_as_job
from model.problems import BadInput
from model.weights import StoredWeights
from parallel.processes import free_port
from parallel.rendezvous import Rendezvous
from tests.shapes import preset
from train import hosts, loop, preflight, pretrain, uptrain
from train.pretrained import Source


@pytest.fixture
def compositions(monkeypatch):
    """The overrides of each composition of this process."""
    compose, made = ConfigLoaderImpl.load_configuration, []

    def counted(self, config_name, overrides, *rest, **options):
        made.append(list(overrides))
        return compose(self, config_name, overrides, *rest, **options)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counted)
    return made


@pytest.fixture(autouse=True)
def logs_as_before():
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in root.handlers:
        if handler not in before:
            handler.close()
    root.handlers[:] = before
    root.setLevel(level)


@pytest.fixture
def trained(monkeypatch):
    """What would be trained; no process is started."""
    runs = []
    monkeypatch.setattr(loop, "train", lambda prepared, signals, rendezvous: runs.append(prepared))
    monkeypatch.setattr(pretrain, "die_with", lambda supervisor: None)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_SIZE", "1")):
        monkeypatch.setenv(name, value)
    return runs


def test_a_process_composes_its_configuration_once(overrides, compositions, trained, tmp_path):
    folder = tmp_path / "run"
    named = f"hydra.run.dir={tmp_path}/${{now:%f}}"  # by the microsecond: a second look would find another
    pretrain.main([*overrides, named])
    assert len(compositions) == 1
    (prepared,) = trained
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert prepared.run_dir == folder
    assert {path.name for path in (folder / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert OmegaConf.load(folder / ".hydra" / "overrides.yaml") == overrides
    written = OmegaConf.load(folder / ".hydra" / "config.yaml")
    assert "hydra" not in written and written.model.n_layers == 4 and written.train.seq_len == 32
    of_hydra = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra
    assert of_hydra.run.dir == of_hydra.runtime.output_dir == str(folder)


def test_other_ranks_take_over_what_rank_0_has_prepared_and_write_nothing(
    overrides, compositions, trained, tmp_path, monkeypatch
):
    given = [*overrides, f"hydra.run.dir={tmp_path / 'run'}"]
    prepared = preflight.preflight(given)
    compositions.clear()
    monkeypatch.setattr(preflight, "prepare_run", None)  # nor do they look at the corpus
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("LOCAL_RANK", "0")
    rank_0 = Rendezvous(0, 2, timedelta(seconds=10))
    rank_0.share(lambda: (prepared, given, hosts.of_rank_0(tmp_path, saves=False)))
    pretrain.main(given)
    rank_0.leave()
    (found,) = trained
    assert compositions == [] and not (tmp_path / "run").exists()
    assert found.config == prepared.config and found.run_dir == prepared.run_dir and found.data == prepared.data


def test_weights_to_begin_with_imply_overrides_and_so_a_second_composition(
    overrides, compositions, trained, tmp_path, monkeypatch
):
    config = preset(*overrides).model
    tokenizer = preflight.preflight(overrides).data.tokenizer_path
    compositions.clear()
    weights = Source(tmp_path, StoredWeights(config, tmp_path, {}), None, None)
    monkeypatch.setattr(uptrain, "open_source", lambda path, checked, key: weights)
    rest = [override for override in overrides if not override.startswith("model.")]
    rest.append(f"data.tokenizer={tokenizer}")
    pretrain.main([*rest, f"init_from={tmp_path}", f"hydra.run.dir={tmp_path / 'run'}"])
    assert len(compositions) == 2
    (prepared,) = trained
    assert prepared.config.model.n_layers == 4
    assert "model.n_layers=4" in OmegaConf.load(tmp_path / "run" / ".hydra" / "overrides.yaml")


def test_what_is_said_in_a_job_stands_in_its_log(tmp_path):
    def task():
        logging.getLogger("train").warning("of the run")

    run_as_job(compose_overrides(["model=tiny", "hydra.job.name=mine"]), tmp_path, task)
    assert "of the run" in (tmp_path / "mine.log").read_text()


def test_a_job_has_its_environment_and_stays_where_it_was_started(tmp_path):
    (tmp_path / "model").mkdir()
    settings = "hydra: {job: {env_set: {OF_THE_JOB: those}}}"
    (tmp_path / "model" / "mine.yaml").write_text(f"# @package _global_\n{settings}\n")
    composition = compose_overrides(["model=mine", "hydra.job.chdir=true", f"--config-dir={tmp_path}"])
    assert composition.problems == []
    seen, where = [], os.getcwd()
    run_as_job(composition, tmp_path, lambda: seen.append((os.environ.get("OF_THE_JOB"), os.getcwd())))
    assert seen == [("those", where)] and "OF_THE_JOB" not in os.environ


@pytest.mark.parametrize("error", [BadInput(["a"]), SystemExit(1), KeyboardInterrupt()])
def test_what_a_job_raises_passes(error, tmp_path):
    def task():
        raise error

    with pytest.raises(type(error)) as caught:
        run_as_job(compose_overrides(["model=tiny"]), tmp_path, task)
    assert caught.value is error
