"""Command-line overrides are composed into a configuration, and all mistakes in them reported at once."""

import copy
import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from conf.schema import Config, register
from model.problems import BadInput


class Composition:
    """A configuration composed from a command line: the settings, the run folder, and the problems found.

    Attributes:
        node: what Hydra composed, its own section among it: the source of all files and logs of the run.
        config: the settings; overrides that cannot be applied are left out of it and stand in `problems`.
        run_dir: `hydra.run.dir`.
        problems: one sentence per override that cannot be applied.
    """

    def __init__(self, node: DictConfig, problems: list[str]):
        self.node = node
        self.run_dir = Path(node.hydra.run.dir)
        self.problems = problems
        settings = copy.deepcopy(node)
        with flag_override(settings, ["struct", "readonly"], False):
            del settings["hydra"]
        self.config = to_config(settings)


def to_config(node: DictConfig) -> Config:
    """Turn a composed Hydra configuration into the dataclasses of the schema."""
    config = OmegaConf.to_object(node)
    assert isinstance(config, Config), "config.yaml starts from the schema"
    return config


def quoted(value: object) -> str:
    """Quote a text as the value of an override, whatever is in it."""
    return QuotedString(str(value), Quote.single).with_quotes()


def compose_overrides(
    overrides: Sequence[str], config_name: str = "config", config_dir: str | None = None
) -> Composition:
    """Compose the configuration that Hydra would, and judge each override by itself where that fails.

    Args:
        overrides: as on Hydra's command line: ``model=67b``, ``parallel.pp=4``, ``+key=value``, ``~key``.
        config_name: the primary config, Hydra's ``--config-name``.
        config_dir: one more folder of YAML groups, Hydra's ``--config-dir``.

    Raises:
        BadInput: not even the overrides that look sound compose.
    """
    register()
    search = [f"hydra.searchpath=[{Path(config_dir).resolve().as_uri()}]"] if config_dir else []
    with _hydra():
        try:
            # The schema is closed: Hydra's "+key=value" would add a key that nothing reads.
            if not any(override.startswith("+") for override in overrides):
                return Composition(_compose(config_name, [*search, *overrides]), [])
        except _IMPOSSIBLE:
            pass
        sound, problems = _sift(config_name, search, overrides)
        try:
            return Composition(_compose(config_name, [*search, *sound]), problems)
        except _IMPOSSIBLE as error:
            raise BadInput([*problems, _one_line(error)]) from None


@contextmanager
def _hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        yield


def _compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    return compose(config_name, list(overrides), return_hydra_config=True)


def _sift(config_name: str, search: list[str], overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Sift the overrides that can be applied from the others, and return a sentence for each of the latter."""
    sound: list[str] = []
    problems: list[str] = []
    defaults = _compose(config_name, search)
    # Groups first: which keys a value override may name does not depend on it here, but its preset's values do.
    for override in sorted(overrides, key=lambda text: "." in text.partition("=")[0]):
        try:
            parsed = OverridesParser.create().parse_override(override)
            if parsed.is_sweep_override():  # a,b: several runs to Hydra, and one path to its user
                raise HydraException
        except HydraException:
            problems.append(f"{override}: {_unreadable(override)}")
            continue
        try:
            problem = _judge(parsed, defaults)
            if problem is None:
                # To the end, so that ${...} in a value is looked up as well.
                Composition(_compose(config_name, [*search, *sound, override]), [])
        except _IMPOSSIBLE as error:
            problem = f"{override}: {_one_line(error)}"
        if problem is None:
            sound.append(override)
        else:
            problems.append(problem)
    return sound, problems


def _unreadable(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return "not an override; write key=value"
    # Hydra reads =, commas, brackets, a leading ~ and letters beyond ASCII inside quotes only, and the shell takes one
    # pair of them away.
    example = "" if value[:1] in ("[", "{", '"', "'") else ", such as " + shlex.quote(f'{key}="{value}"')
    return f"Hydra cannot read this value; quotes around its text that the shell leaves in place{example}, would work"


def _judge(override: Override, defaults: DictConfig) -> str | None:
    key, text = override.key_or_group, override.input_line or ""
    options = GlobalHydra.instance().config_loader().get_group_options(key)
    if options and "." not in key:
        value = override.get_value_element_as_str()
        if value in options or override.is_delete():
            return None
        nearest = _nearest(value, options)
        hint = f"did you mean {' or '.join(f'{key}={name}' for name in nearest)}? " if nearest else ""
        return f"{text}: no such preset; {hint}There are {', '.join(sorted(options))}"
    if OmegaConf.select(defaults, key, default=_MISSING) is not _MISSING:
        return None
    nearest = _nearest(key, _keys(defaults))
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else "--cfg job lists all keys"
    return f"{text}: no such key; {hint}"


_MISSING = object()
# Hydra raises a bare ValueError for a group set to no name (model=null).
_IMPOSSIBLE = (HydraException, OmegaConfBaseException, ValueError)


def _keys(node: DictConfig) -> list[str]:
    """List every dotted key, sections included, without those of Hydra's own section."""
    found: list[str] = []
    for name in map(str, node):
        if name == "hydra":
            continue
        found.append(name)
        if OmegaConf.is_dict(node._get_node(name)):
            found += [f"{name}.{inner}" for inner in _keys(node[name])]
    return found


def _nearest(word: str, known: Sequence[str]) -> list[str]:
    """Find at most two of the known words, nearest first; a key given without its section counts as near."""
    by_leaf = [key for key in known if key.rpartition(".")[2] == word.rpartition(".")[2]]
    return list(dict.fromkeys(by_leaf + difflib.get_close_matches(word, known, n=2, cutoff=0.5)))[:2]


def _one_line(error: Exception) -> str:
    """Say the innermost cause in one sentence: Hydra wraps OmegaConf's reason in a longer and emptier one."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if match := re.search(r"could not be converted to (\w+)$", text):
        kinds = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false"}
        return f"must be {kinds.get(match[1], match[1])}"
    return text[0].lower() + text[1:]
