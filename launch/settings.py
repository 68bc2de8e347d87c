"""Settings of one command, `PREFIX.key=value`, that are part of no run's configuration."""

from collections.abc import Sequence
from typing import TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Settings = TypeVar("Settings")


def settings_of(kind: type[Settings], prefix: str, overrides: Sequence[str]) -> tuple[Settings, list[str]]:
    """Compose a command's own settings from overrides, read as Hydra reads those of a run.

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
        try:
            parsed = OverridesParser.create().parse_override(text)
        except HydraException:
            problems.append(f"{text}: not an override; write key=value, and quote what has spaces, commas or brackets")
            continue
        key = str(parsed.key_or_group).removeprefix(prefix)
        try:
            OmegaConf.update(node, key, parsed.value(), merge=True, force_add=False)
        except (OmegaConfBaseException, HydraException, ValueError) as error:
            problems.append(f"{text}: {_unknown(node, prefix, key) or str(error).splitlines()[0]}")
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
