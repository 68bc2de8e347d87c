"""The one schema: every section's dataclass, composed and registered with Hydra."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from conf.settings import DataConfig, OptimizerConfig, SampleConfig, ScheduleConfig, TrainConfig, WandbConfig
from model.config import ModelConfig
from parallel.layout import ParallelConfig


@dataclass
class Config:
    """All settings of a run."""

    preset: str = "custom"
    """Set by the model preset; names the run."""
    name: str = "custom"
    """Names the run folder (runs/NAME) and the W&B run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


# What a run may change without becoming another run: where things lie, how long a trial is, what is looked at.
_NOT_IDENTITY = {
    "model": {"attention"},
    "data": {"cache_dir"},
    "train": {"max_steps", "micro_batch", "precision", "val_every", "val_sequences"},
}


def run_name(root: DictConfig) -> str:
    """``67b-files-f6aa340``: preset, corpus, and a fingerprint of what shapes the loss curve.

    That is model, data, optimizer, schedule, seed, batch and length; the layout is no part of it.
    """
    identity: dict[str, Any] = {}
    for section in ("model", "data", "optimizer", "schedule", "train"):
        values = OmegaConf.to_container(root[section], resolve=True, enum_to_str=True)
        assert isinstance(values, dict)
        left_out = _NOT_IDENTITY.get(section, set())
        identity[section] = {str(key): value for key, value in values.items() if key not in left_out}
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:7]
    return f"{root.preset}-{identity['data']['source']}-{fingerprint}"


def register() -> None:
    """Make the schema and the `run_name` resolver known to Hydra; may be called again."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("run_name", lambda *, _root_: run_name(_root_), replace=True)
