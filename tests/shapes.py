"""Models and settings that several tests use."""

import copy
from functools import cache

from torch import nn

from conf.compose import compose_overrides
from conf.schema import Config
from model.config import ModelConfig


def preset(*overrides: str) -> Config:
    """The configuration of a preset or of overrides."""
    return copy.deepcopy(_composed(overrides))


@cache
def _composed(overrides: tuple[str, ...]) -> Config:
    composition = compose_overrides([text if "=" in text else f"model={text}" for text in overrides])
    assert not composition.problems
    return composition.config


def small(kv_heads: int = 2, **changes: object) -> ModelConfig:
    """A model of two narrow blocks; 4 kv heads are MHA, 2 are GQA, 1 is MQA."""
    shape = dict(
        n_layers=2, d_model=64, n_heads=4, n_kv_heads=kv_heads, d_ff=160, vocab_size=300, max_seq_len=64, init_std=0.05
    )
    return ModelConfig(**{**shape, **changes})


def matrices_and_vectors(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of a model on which weight decay acts, and the others."""
    parameters = list(model.parameters())
    return [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
