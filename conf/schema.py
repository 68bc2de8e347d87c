"""The one schema: every section's dataclass, composed and registered with Hydra."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from conf.alert_settings import AlertsConfig
from conf.eval_settings import EvalConfig
from conf.launch_settings import LaunchConfig
from conf.train_settings import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    SampleConfig,
    ScheduleConfig,
    TrainConfig,
    UptrainConfig,
    WandbConfig,
)
from model.config import EXECUTION_KEYS, ModelConfig
from parallel.layout import ParallelConfig


@dataclass
class Config:
    """All settings of a run."""

    preset: str = "custom"
    """Set by the model preset; names the run."""
    name: str = "custom"
    """Names the run folder (runs/NAME) and the W&B run."""
    resume: str = "auto"
    """auto goes on from the newest sound checkpoint of the run folder, never starts again; a checkpoint or run folder
    elsewhere is where the run begins, and once it has saved, the same command goes on from its own."""
    init_from: str | None = None
    """The first weights, and with them the model's shape: a run, a checkpoint, a Hugging Face directory, or what
    `deepnarrow import` or `regroup` wrote. Optimizer, step and data begin anew; null draws the weights."""
    cluster: str | None = None
    """What the predicted seconds of a step are for, which stand beside the measured ones: a preset such as h100 (its
    figures are the data sheet's), or a YAML file of `deepnarrow bench --save` and `deepnarrow check --save`. Null takes
    the preset of the GPU, where there is one, and predicts nothing elsewhere. How many machines there are is the run's
    own. Where a file has price_per_gpu_hour, the log says what the run has cost and will have cost."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    uptrain: UptrainConfig = field(default_factory=UptrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)


_RECIPE_SECTIONS = ("model", "data", "optimizer", "schedule", "train")
# What a run may change without becoming another run: where things lie, how long a trial is, what is looked at.
_NOT_RECIPE = {
    "model": set(EXECUTION_KEYS),
    "data": {"cache_dir", "max_bad", "workers"},
    "train": {"max_steps", "max_skipped", "micro_batch", "precision", "deterministic", "profile", "profile_ranks"}
    | {"log_every", "timeline_at", "val_at", "val_every", "val_sequences", "straggler_percent", "straggler_steps"}
    | {"skip_steps", "skip_samples_at"},  # of bad data, which a run passes over when it is taken back
}
# What came later, with the value that runs of before were trained with.
_BEFORE: dict[str, Any] = {
    "model.window": None,
    "model.window_pattern": None,
    "data.sources": {},
    "data.stages": [],
    "data.token_dtype": None,
    "data.document_mask": False,
    "data.packing": "concat",
    "train.spike_sigmas": 6.0,  # they skipped for no spike; that what guards them is new makes them no other runs
}
# Values that do not name a run, so that the commands of those runs find them again.
_UNNAMED = {**_BEFORE, "data.document_mask": None}


def to_jsonable(value: Any) -> Any:
    """Replace the enums of nested settings, such as `dataclasses.asdict` makes, by their names, which JSON can hold."""
    if isinstance(value, dict):
        return {key: to_jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [to_jsonable(inner) for inner in value]
    return value.name if isinstance(value, Enum) else value


def recipe_fields(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Select what shapes the loss curve: model, data, optimizer, schedule, seed, batch, length, first weights.

    Args:
        sections: of a configuration, as plain dictionaries with enums by name. The layout is no part of a recipe.

    Returns:
        The values by dotted key, with those of keys that a configuration is too old to have.
    """
    found = {
        f"{section}.{key}": value
        for section in _RECIPE_SECTIONS
        for key, value in sections[section].items()
        if key not in _NOT_RECIPE.get(section, set())
    }
    begins = sections.get("init_from")
    return {**_BEFORE, **found, **({} if begins is None else {"init_from": begins})}


def run_name(root: DictConfig) -> str:
    """Name a run, as ``67b-files-f6aa340``: preset, kind of corpus, and a fingerprint of the recipe fields."""
    sections: dict[str, Any] = {
        section: OmegaConf.to_container(root[section], resolve=True, enum_to_str=True) for section in _RECIPE_SECTIONS
    }
    sections["init_from"] = root.init_from
    named = {key: value for key, value in recipe_fields(sections).items() if _UNNAMED.get(key, ...) != value}
    fingerprint = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:7]
    corpus = "mixture" if sections["data"]["sources"] else sections["data"]["source"]
    return f"{root.preset}-{corpus}-{fingerprint}"


@cache
def register() -> None:
    """Make the schema and the `run_name` resolver known to Hydra, once in a process."""
    schema = OmegaConf.structured(Config)
    for section in (schema.data.sources, schema.eval.sets):
        OmegaConf.set_struct(section, False)  # its keys are names that the user gives
    ConfigStore.instance().store(name="schema", node=schema)
    OmegaConf.register_new_resolver("run_name", lambda *, _root_: run_name(_root_), replace=True)
