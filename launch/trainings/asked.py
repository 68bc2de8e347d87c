"""What the command of a study asks for: its own settings, and the overrides of its runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from conf.overrides import key_of
from conf.schema import Config
from launch.settings import settings_of
from model.config import ModelConfig

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Asked(Generic[Settings]):
    """The overrides of a command, taken apart.

    Attributes:
        settings: of the study.
        rest: the overrides of its runs.
        keys: what they set.
        problems: a sentence for each setting that cannot be applied.
        refused: a sentence for each key of the runs that is the study's to set.
    """

    settings: Settings
    rest: list[str]
    keys: set[str]
    problems: list[str]
    refused: list[str]


def asked_of(overrides: Sequence[str], kind: type[Settings], prefix: str, own: Mapping[str, str]) -> Asked[Settings]:
    """Take the overrides of a study's command apart.

    Args:
        overrides: of the command.
        kind: the dataclass of the study's settings.
        prefix: what stands before each of their keys, with the dot.
        own: the keys of a run that the study sets itself, each with what works in its place.
    """
    settings, problems = settings_of(kind, prefix, [text for text in overrides if text.startswith(prefix)])
    rest = [text for text in overrides if not text.startswith(prefix)]
    keys = {key_of(text) for text in rest}
    refused = [f"{key}: is the study's to set; {works}" for key, works in own.items() if key in keys]
    return Asked(settings, rest, keys, problems, refused)


def shape_overrides(model: ModelConfig) -> list[str]:
    """Return the overrides that give a preset the depth and the widths of a model."""
    keys = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff")
    values = {key: getattr(model, key) for key in keys}
    return [f"model.{key}={'null' if value is None else value}" for key, value in values.items()]


def unmeasured(config: Config) -> list[str]:
    """Say that runs hold no documents out, on which a study measures their losses."""
    said = "data.val_fraction=0: a study measures the loss on held-out documents; 0.01 would work"
    return [] if config.data.val_fraction else [said]
