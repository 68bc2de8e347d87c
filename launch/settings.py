"""Settings of one command, `PREFIX.key=value`, that are part of no run's configuration."""

from collections.abc import Sequence
from contextlib import suppress
from typing import TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Settings = TypeVar("Settings")


def settings_of(kind: type[Settings], prefix: str, overrides: Sequence[str]) -> tuple[Settings, list[str]]:
    """Compose a command's own settings from overrides, read as Hydra reads those of a run, or else as plain texts.

    Args:
        kind: their dataclass.
        prefix: what stands before each key, with the dot.
        overrides: those of the command line that begin with it.

    Returns:
        The settings, and a sentence for each override that cannot be applied.
    """
    node = OmegaConf.structured(kind)
    problems = []
    for text in overrides:
        key, _, plain = text.removeprefix(prefix).partition("=")
        value: object = plain  # of a path with spaces, say, which Hydra would have quoted, or with a comma: no sweep
        with suppress(HydraException):
            parsed = OverridesParser.create().parse_override(text)
            value = plain if parsed.is_sweep_override() else parsed.value()
        try:
            OmegaConf.update(node, key, value, merge=True, force_add=False)
        except (OmegaConfBaseException, HydraException, ValueError) as error:
            reason = _unknown(node, prefix, key) or str(error).split("\n")[0]
            if "ListConfig" in reason:  # OmegaConf's word
                reason = f"a list stands in brackets; {prefix}{key}=[{plain}] would work"
            problems.append(f"{text}: {reason}")
    settings = OmegaConf.to_object(node)
    assert isinstance(settings, kind)
    return settings, problems


def _unknown(node: DictConfig, prefix: str, key: str) -> str | None:
    """Say that there is no such key, with those that there are in its place; None where there is."""
    for part in key.split("."):
        if not OmegaConf.is_dict(node):
            return None
        if part not in node:
            return f"no such key; there are {', '.join(prefix + str(name) for name in node)}"
        node, prefix = node[part], f"{prefix}{part}."
    return None
