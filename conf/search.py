"""Hydra's options that say where a configuration is composed from: a folder of one's own, and a primary config."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.paths import expanded, path_problems
from model.problems import BadInput, either

OWN = "config"
"""The package's own primary config."""
_BASE, _LAYERED = "_package_config", "_layered_config"
_RAISED = (OSError, ValueError, YAMLError, OmegaConfBaseException)


@dataclass(frozen=True)
class Options:
    """Where a configuration is composed from.

    Attributes:
        config_name: the primary config, Hydra's ``--config-name``.
        config_dir: a folder of YAML groups and primary configs, Hydra's ``--config-dir``; its files go before the
            package's of the same name.
    """

    config_name: str = OWN
    config_dir: str | None = None

    @property
    def arguments(self) -> list[str]:
        """The options as they stand on a command line."""
        folder = [f"--config-dir={self.config_dir}"] if self.config_dir is not None else []
        return [f"--config-name={self.config_name}", *folder] if self != Options() else []

    @property
    def file(self) -> Path | None:
        """The file of the primary config in the folder; None where it is the package's."""
        if self.config_dir is None:
            return None
        path = expanded(self.config_dir) / f"{self.config_name.removesuffix('.yaml')}.yaml"
        return path if path.is_file() else None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput([message.removeprefix("argument ")])


def long_options(arguments: Sequence[str]) -> list[str]:
    """Write Hydra's short options out: argparse would take ``-c``, of ``--cfg``, for a part of any of them."""
    short = {"-cd": "--config-dir", "-cn": "--config-name", "-cp": "--config-path"}
    words = [argument.partition("=") for argument in arguments]
    return [short.get(name, name) + equals + value for name, equals, value in words]


def split_options(arguments: Sequence[str], *, asks: bool = False) -> tuple[Options, list[str]]:
    """Split a command line of Hydra's into the options that decide what is composed, and the overrides.

    Args:
        arguments: overrides and options, in any order.
        asks: whether Hydra is asked a question (``--cfg job``), so that its other options stay among the overrides.

    Raises:
        BadInput: an option is unknown, is given twice or without a value, or names what is not there.
    """
    parser = _Parser(prog="deepnarrow", add_help=False, allow_abbrev=False)
    for option in ("--config-dir", "--config-name", "--config-path"):
        parser.add_argument(option, action="append")
    given, rest = parser.parse_known_args(long_options(arguments))
    rest = rest if asks else [argument for argument in rest if argument not in ("-r", "--run")]
    problems = []
    unknown = [argument for argument in rest if argument.startswith("-") and not asks]
    if several := [argument for argument in unknown if argument in ("-m", "--multirun")]:
        problems.append(
            f"{several[0]}: starts several runs in one process, which ranks under a launcher are not; a command for "
            "each would work, as in: for seed in 1 2; do deepnarrow train train.seed=$seed; done"
        )
    if unknown := [argument for argument in unknown if argument not in several]:
        problems.append(f"{', '.join(unknown)}: not an option here; --config-dir and --config-name would be")
    if given.config_path:
        problems.append(
            f"--config-path={given.config_path[0]}: would leave the package's own presets out; "
            f"--config-dir={given.config_path[0]} adds a folder to them, whose files go before"
        )
    for key, values in (("--config-dir", given.config_dir), ("--config-name", given.config_name)):
        if values and len(set(values)) > 1:
            problems.append(f"{key}={values[1]}: is {values[0]} as well; one would work")
        if values and not values[0].strip():
            problems.append(f"{key}={values[0]}: is empty; a value, or leaving it out, would work")
    if problems:
        raise BadInput(problems)
    options = Options((given.config_name or [OWN])[0], (given.config_dir or [None])[0])
    if problem := _not_there(options):
        raise BadInput([problem])
    return options, rest


def _not_there(options: Options) -> str | None:
    """Say, in a sentence, what of the options is not there."""
    if options.config_dir is not None and (problems := path_problems("--config-dir", options.config_dir)):
        return problems[0]
    folder = expanded(options.config_dir) if options.config_dir is not None else None
    if folder and not folder.is_dir():
        why = "is a file" if folder.exists() else "not there"
        works = folder.absolute().parent if folder.is_file() else "a folder with YAML files"
        return f"--config-dir={options.config_dir}: {why}; {works} would work (relative to {os.getcwd()})"
    if folder and not os.access(folder, os.R_OK | os.X_OK):
        return f"--config-dir={options.config_dir}: no permission to read it; a folder that can be read would work"
    name = options.config_name.removesuffix(".yaml")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        path = Path(options.config_name)
        works = f"--config-dir={path.parent} --config-name={path.stem} would work"
        return f"--config-name={options.config_name}: a name inside a folder, not a path; {works}"
    if options.file is not None or (Path(__file__).parent / f"{name}.yaml").is_file():
        return None
    there = sorted(path.stem for path in folder.glob("*.yaml")) if folder else []
    works = either("--config-name", there) if there else "--config-dir=DIR of a folder that has one"
    where = f"{folder} nor " if folder else ""
    return f"--config-name={name}: no {name}.yaml in {where}the package's own configs; {works} would work"


@dataclass(frozen=True)
class Primary:
    """The primary config to compose.

    Attributes:
        name: by which Hydra finds it.
        file: the one without a defaults list that stands on top of the package's own; None where there is none.
        sets: the keys that this file sets, over what a preset sets: all of them in the config.yaml of a run folder.
    """

    name: str
    file: Path | None = None
    sets: frozenset[str] = frozenset()


class _OwnFolder(SearchPathPlugin):
    """Puts a folder before the package's on Hydra's search path; Hydra itself would put it behind."""

    folder: ClassVar[Path | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Put it there."""
        if self.folder is not None:
            anchor = SearchPathQuery(provider="main")
            search_path.prepend(provider="command-line", path=f"file://{self.folder}", anchor=anchor)


@contextmanager
def searched(options: Options) -> Iterator[Primary]:
    """Let Hydra, as long as this is entered, find the configs of a folder of one's own.

    Args:
        options: from `split_options`.

    Raises:
        BadInput: the primary config cannot be read.
    """
    Plugins.instance().register(_OwnFolder)
    before = _OwnFolder.folder
    try:
        primary = _primary(options)
        _OwnFolder.folder = expanded(options.config_dir).resolve() if options.config_dir is not None else None
        yield primary
    finally:
        _OwnFolder.folder = before


def _primary(options: Options) -> Primary:
    """Find the primary config; one without a defaults list stands on top of the package's own."""
    name, file = options.config_name.removesuffix(".yaml"), options.file
    if file is None:
        return Primary(name)
    try:
        content = OmegaConf.load(file)
        if not isinstance(content, DictConfig):
            raise ValueError("is no mapping of keys to values")
    except _RAISED as error:
        works = "a YAML file of keys and values, such as `train: {max_steps: 100}`, would work"
        said = " ".join(str(error).split())
        raise BadInput([f"--config-name={options.config_name}: {file}: {said}; {works}"]) from None
    defaults = content.get("defaults")
    if defaults is not None and name != OWN:
        return Primary(name)
    # A folder's own config.yaml hides the package's, and may build on it all the same.
    listed = [OWN, "_self_"] if defaults is None else OmegaConf.to_container(defaults)
    assert isinstance(listed, list)
    content["defaults"] = [_BASE if entry in (OWN, f"/{OWN}") else entry for entry in listed]
    store = ConfigStore.instance()
    store.store(name=_BASE, node=OmegaConf.load(Path(__file__).parent / f"{OWN}.yaml"))
    store.store(name=_LAYERED, node=content)
    sets = keys_of(OmegaConf.to_container(content)) if defaults is None else frozenset()
    return Primary(_LAYERED, file if defaults is None else None, sets)


def keys_of(settings: Any, prefix: str = "") -> frozenset[str]:
    """List the dotted keys of nested settings, without those of their sections."""
    if not isinstance(settings, dict):
        return frozenset([prefix.removesuffix(".")])
    return frozenset().union(*(keys_of(inner, f"{prefix}{key}.") for key, inner in settings.items()))
