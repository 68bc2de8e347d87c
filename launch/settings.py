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
            known = _knows(node, key)
            there = ", ".join(prefix + name for name in kind.__dataclass_fields__)  # type: ignore[attr-defined]
            problems.append(f"{text}: {str(error).splitlines()[0] if known else f'no such key; there are {there}'}")
    settings = OmegaConf.to_object(node)
    assert isinstance(settings, kind)
    return settings, problems


def _knows(node: DictConfig, key: str) -> bool:
    try:
        OmegaConf.select(node, key, throw_on_missing=False)
    except OmegaConfBaseException:
        return False
    return key.partition(".")[0] in node
