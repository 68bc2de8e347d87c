"""Command-line overrides are composed into a configuration, and all mistakes in them reported at once."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf, flag_override

from conf.overrides import IMPOSSIBLE, Sifted, is_group, key_of, one_line, sift, without_effect
from conf.paths import expanded
from conf.schema import Config, register
from conf.search import OWN, Options, Primary, searched, split_options
from model.problems import BadInput


class Composition:
    """A configuration composed from a command line: the settings, the run folder, and the problems found.

    Attributes:
        node: what Hydra composed, its own section among it: the source of all files and logs of the run.
        config: the settings; overrides that cannot be applied are left out of it and stand in `problems`.
        run_dir: `hydra.run.dir`.
        problems: one sentence per override that cannot be applied.
    """

    def __init__(self, node: DictConfig, sifted: Sifted | None = None):
        self.node = node
        self.run_dir = expanded(node.hydra.run.dir)
        self.problems = sifted.problems if sifted else []
        self._refused = sifted.refused if sifted else []
        settings = copy.deepcopy(node)
        with flag_override(settings, ["struct", "readonly"], False):
            del settings["hydra"]
        self.config = to_config(settings)

    def all_problems(self, found: Sequence[str]) -> list[str]:
        """List the problems of the overrides, and of those found in `config` the ones that are true of the command.

        A setting whose override could not be read is not what the command means: what hangs on it is not said. Where a
        preset could not be chosen, what hangs on it is said with the preset that it was judged by.

        Args:
            found: problems of `config`, one sentence each.
        """
        told = list(self.problems)
        settings = [key for key in self._refused if "." in key or key in ("init_from", "resume", "name")]
        for problem in found:
            if any(re.search(rf"\b{re.escape(key)}\b(?!\.)", problem) for key in settings):
                continue
            groups = [group for group in _SETS if group in self._refused]
            hangs = [group for group in groups if re.search(rf"\b({'|'.join(_SETS[group])})\.", problem)]
            chosen = " ".join(f"{group}={self.node.hydra.runtime.choices.get(group)}" for group in hangs)
            told.append(f"{problem} (judged with {chosen})" if hangs else problem)
        return told


_SETS = {
    "model": ("model", "optimizer", "schedule", "train"),
    "data": ("data", "sample"),
    "schedule": ("schedule",),
}
"""The sections in which the presets of a group set keys."""


def to_config(node: DictConfig) -> Config:
    """Turn a composed Hydra configuration into the dataclasses of the schema.

    Raises:
        TypeError: it does not build on the schema.
    """
    config = OmegaConf.to_object(node)
    if not isinstance(config, Config):
        raise TypeError("the primary config starts from the schema")
    return config


def stored_config(stored: Mapping[str, Any]) -> Config:
    """Turn the settings that a run has stored into the dataclasses of the schema; what is not named has its default.

    Args:
        stored: sections by name, as JSON has them: those of a checkpoint's manifest.
    """
    return to_config(cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Config), stored)))


def quoted(value: object) -> str:
    """Quote a text as the value of an override, whatever is in it."""
    return QuotedString(str(value), Quote.single).with_quotes()


def compose_overrides(arguments: Sequence[str]) -> Composition:
    """Compose the configuration that Hydra would, and judge each override by itself where that fails.

    Args:
        arguments: as on Hydra's command line: the overrides ``model=67b``, ``parallel.pp=4``, ``+key=value``,
            ``~key``, and the options that `conf.search` knows, ``--config-dir`` and ``--config-name``.

    Raises:
        BadInput: not even the overrides that look sound compose, or the options name what is not there.
    """
    register()
    options, overrides = split_options(arguments)
    with searched(options) as primary, _hydra():
        try:
            return _composition(primary, options, overrides)
        except TypeError:
            hint = f"`defaults: [{OWN}, _self_]` at its top would work"
            raise BadInput([f"--config-name={options.config_name}: lacks the package's own config; {hint}"]) from None


def _composition(primary: Primary, options: Options, overrides: list[str]) -> Composition:
    idle = without_effect(overrides, primary)
    overrides = [override for override in overrides if override not in idle]
    try:
        # The schema is closed: Hydra's "+key=value" would add a key that nothing reads.
        added = [override for override in overrides if override.startswith("+")]
        if all(is_group(key_of(override)) for override in added):
            return Composition(_compose(primary, options, overrides), Sifted(problems=[*idle.values()]))
    except IMPOSSIBLE:
        pass

    @cache
    def composed(*some: str) -> DictConfig:
        return _compose(primary, options, some)

    try:
        # To the end, so that ${...} in a value is looked up as well.
        sifted = sift(overrides, composed(), lambda some: Composition(composed(*some)))
    except IMPOSSIBLE as error:
        raise BadInput([f"{' '.join(options.arguments)}: {one_line(error)}"]) from None
    sifted.problems += idle.values()
    try:
        return Composition(composed(*sifted.sound), sifted)
    except IMPOSSIBLE as error:
        raise BadInput([*sifted.problems, one_line(error)]) from None


@contextmanager
def _hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        yield


def _compose(primary: Primary, options: Options, overrides: Sequence[str]) -> DictConfig:
    node = compose(primary.name, list(overrides), return_hydra_config=True)
    node.hydra.job.config_name = options.config_name
    return node
