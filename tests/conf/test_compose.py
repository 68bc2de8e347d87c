from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from conf.compose import compose_overrides
from conf.nearest import ELSEWHERE, nearest_keys
from conf.overrides import _keys
from conf.schema import Config
from conf.train_settings import Decay, Source
from conf.validate import Machine, validate
from tests.shapes import preset

PRESETS = ["tiny", "7b", "67b", "8x512", "12x768", "24x1024", "24x2048", "32x4096", "40x5120", "80x8192"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_composes_and_is_sound(name):
    config = preset(name)
    layout, problems = validate(config, Machine(gpus=0))
    assert problems == [] and layout is not None
    assert config.preset == name
    if "x" in name:
        layers, width = map(int, name.split("x"))
        assert (config.model.n_layers, config.model.d_model, config.model.vocab_size) == (layers, width, 102400)
    assert config.model.d_ff == -(-config.model.d_model * 8 // 3 // 256) * 256 or name == "tiny"


def test_the_papers_recipes():
    big, small = preset("67b"), preset("7b")
    assert (small.model.n_kv_heads, big.model.n_kv_heads, big.model.n_heads) == (32, 8, 64)
    assert (small.train.global_batch, big.train.global_batch) == (2304, 4608)
    assert (small.optimizer.lr, big.optimizer.lr) == (4.2e-4, 3.2e-4)
    for config in (small, big):
        assert config.train.total_tokens == 2e12 and config.schedule.warmup_steps == 2000
        assert config.schedule.decay is Decay.multi_step
        assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.weight_decay) == (0.9, 0.95, 0.1)
        assert config.optimizer.clip == 1.0 and config.model.init_std == 0.006


def test_tiny_is_a_scale_model():
    model = preset("tiny").model
    assert 1 < model.n_kv_heads < model.n_heads
    assert model.d_model / model.n_layers < 20


def test_groups_and_overrides():
    config = preset("data=files", "data.path=/x/*.txt", "schedule=wsd", "train.total_tokens=2e9", "optimizer.clip=null")
    assert config.data.source is Source.files and config.data.path == "/x/*.txt"
    assert config.schedule.decay is Decay.wsd
    assert config.train.total_tokens == 2e9 and config.optimizer.clip is None


def test_the_cache_moves_by_environment(monkeypatch):
    monkeypatch.setenv("DEEPNARROW_CACHE", "/somewhere")
    assert compose_overrides([]).config.data.cache_dir == "/somewhere"
    monkeypatch.delenv("DEEPNARROW_CACHE")
    assert compose_overrides([]).config.data.cache_dir == "~/.cache/deepnarrow"


def test_runs_of_one_recipe_share_a_folder_whatever_their_layout():
    def folder(*overrides):
        return compose_overrides(overrides).run_dir

    same = folder("model=7b")
    assert same == folder("model=7b", "parallel.pp=8", "train.micro_batch=4", "wandb.mode=offline", "train.max_steps=9")
    assert same == folder("model=7b", "train.profile=[10]", "train.profile_ranks=[1]", "train.timeline_at=[]")
    assert same == folder("model=7b", "train.log_every=10", "train.deterministic=true")
    assert str(same) == "runs/7b-stdlib-f9f1c76"  # as before there were windows: the same command finds its run again
    assert same == folder("model=7b", "model.window=null", "model.window_pattern=null")
    for other in (
        "model.window=64",
        "train.seed=2",
        "optimizer.lr=1e-3",
        "model.n_layers=31",
        "data.val_fraction=0.1",
        "schedule=cosine",
    ):
        assert folder("model=7b", other) != same
    assert str(folder("name=mine")) == "runs/mine"
    assert str(folder("hydra.run.dir=/tmp/there")) == "/tmp/there"


def test_names_of_other_projects_are_told_the_keys_that_there_are():
    keys = set(_keys(OmegaConf.structured(Config)))
    assert set(ELSEWHERE) <= keys
    page = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text("utf-8").replace("-", "_")
    for key, names in ELSEWHERE.items():  # the page and the errors say the same
        assert key in page or not any(f"`{name}`" in page or f"`__{name}`" in page for name in names.split()), key
    assert nearest_keys("train.foo", sorted(keys)) == nearest_keys("wandb.off", sorted(keys)) == []
    names = [name for text in ELSEWHERE.values() for name in text.split()]
    assert len(names) == len(set(names)) and not set(names) & {key.rpartition(".")[2] for key in keys}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model=57b", ["model=57b: no such preset", "model=7b", "model=67b", "tiny"]),
        ("data=file", ["data=file: no such preset", "did you mean data=files"]),
        ("model.n_layer=3", ["model.n_layer=3: no such key", "model.n_layers"]),
        ("n_layers=3", ["n_layers=3: no such key", "model.n_layers"]),
        ("+train.micro=3", ["train.micro=3: no such key", "train.micro_batch"]),
        ("model.hidden_size=64", ["model.hidden_size=64: no such key; did you mean model.d_model?"]),
        ("train.grad_clip=1", ["train.grad_clip=1: no such key; did you mean optimizer.clip?"]),
        ("trian.micro-batch=2", ["trian.micro-batch=2: no such key; did you mean train.micro_batch?"]),
        ("model.n_layers=many", ["model.n_layers=many", "must be an integer"]),
        ("optimizer.lr=high", ["optimizer.lr=high", "must be a number"]),
        ("train.precision=fp8", ["train.precision=fp8", "auto, bf16, fp32"]),
        ("nonsense", ["nonsense: not an override", "key=value"]),
        ("model=null", ["model=null: no such preset", "tiny"]),
        ("data.path=~/x", ["data.path=~/x: Hydra cannot read this value", """'data.path="~/x"'"""]),
        ("data.path=a=[b]", ["data.path=a=[b]: Hydra cannot read this value", """'data.path="a=[b]"'"""]),
        ("data.path=a,b", ["data.path=a,b: several values, one run each to Hydra", """'data.path="a,b"'"""]),
        ("sample.prompts=[é]", ["sample.prompts=[é]: Hydra cannot read this value"]),
        ("data.path=${nowhere}", ["data.path=${nowhere}:", "not found"]),
    ],
)
def test_an_override_that_cannot_be_applied(override, said):
    problems = compose_overrides(["model=7b", override, "parallel.pp=4"]).problems
    assert len(problems) == 1
    assert all(part in problems[0] for part in said), problems[0]
    assert "\n" not in problems[0]


def test_the_overrides_that_are_sound_are_applied_all_the_same():
    composition = compose_overrides(["nonsense", "model=7b", "model.n_layer=3", "parallel.pp=4"])
    assert len(composition.problems) == 2
    assert composition.config.preset == "7b" and composition.config.parallel.pp == 4


def test_a_folder_of_own_groups(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("# @package _global_\npreset: mine\nmodel: {n_layers: 3}\n")
    composition = compose_overrides(["model=mine", f"--config-dir={tmp_path}"])
    assert composition.problems == [] and composition.config.model.n_layers == 3


def test_every_setting_says_what_it_is():
    import ast
    import inspect

    node = ConfigStore.instance().load("schema.yaml").node
    assert "model" in node
    from conf import train_settings as settings
    from model import config as model_config
    from parallel import layout

    for module in (settings, model_config, layout):
        for cls in ast.parse(inspect.getsource(module)).body:
            if not isinstance(cls, ast.ClassDef) or not cls.name.endswith("Config"):
                continue
            for field, after in zip(cls.body, cls.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign):
                    described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    assert described, f"{cls.name}.{ast.unparse(field.target)} has no docstring"
