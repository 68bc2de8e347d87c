"""The settings of an earlier run, taken again: ``--like RUN`` stands for the overrides that the run was started with.

A run folder keeps them in ``.hydra``: overrides.yaml as they were typed, with what `init_from` implied before them,
config.yaml as all of it was composed, and hydra.yaml with the folders that it was composed from.
"""

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.compose import Composition, compose_overrides, quoted
from conf.overrides import key_of
from conf.paths import checked, expanded
from conf.schema import recipe_fields, register, to_jsonable
from conf.search import OWN, Options, split_options
from model.problems import BadInput
from train.data.formats.remote import is_url
from train.pretrained import open_source
from train.uptrain import compose_with_source, implied

_OF_A_LAUNCH = ("hydra.run.dir", "hydra.job.chdir", "hydra.mode")
_PATHS = re.compile(r"data\.(path|tokenizer|cache_dir|sources\.[^.]+\.path)|init_from|resume")
_GROUPS = ("model", "data", "schedule")
_BY_LENGTH = ("train.total_tokens", "train.skip_samples", "schedule.", "optimizer.lr")
"""What an uptraining works out from how far the weights that it begins with were trained."""


@dataclass
class _Earlier:
    """A run to be like.

    Attributes:
        run: its folder.
        overrides: its overrides, Hydra's own included, without those of where one launch of it was kept.
        options: where its configuration was composed from.
        config: its composed configuration, by dotted key; empty where that cannot be read.
        cwd: where it was started.
        choices: the presets of `model`, `data` and `schedule` that it had, by group.
        said: what there is to say of it, a sentence each.
    """

    run: Path
    overrides: list[str]
    options: Options
    config: dict[str, Any]
    cwd: Path
    choices: dict[str, str]
    said: list[str] = field(default_factory=list)


def take_over(arguments: Sequence[str], *, goes_on: bool = False) -> list[str]:
    """Replace ``--like=RUN`` by that run's overrides and options, and say on stderr what was taken and what was not.

    What the command itself says wins: a key over the run's, a preset over all that the run set in its section. The
    run's name and folder go along only where the recipe stays the same, so that the run then goes on.

    Args:
        arguments: overrides and options of a command; without ``--like`` they are returned as they are.
        goes_on: whether the command trains, and so needs to know which run it is.

    Raises:
        BadInput: there is no such run, or its files cannot be read.
    """
    parser = argparse.ArgumentParser(prog="deepnarrow", add_help=False, allow_abbrev=False)
    parser.add_argument("--like", action="append", nargs="?", const="")
    given, own = parser.parse_known_args(list(arguments))
    if given.like is None:
        return own
    if len(given.like) > 1:
        raise BadInput([f"--like={given.like[1]}: is {given.like[0]} as well; one run would work"])
    earlier = _read(given.like[0])
    if not goes_on:
        _without_its_place(earlier, own)
    taken = _merged(earlier, own)
    if goes_on:
        taken = _as_the_run_or_another(earlier, taken, own)
    print("\n".join(f"--like={earlier.run}: {line}" for line in earlier.said), file=sys.stderr)
    return taken


def _read(named: str) -> _Earlier:
    """Read the files of a run, by its folder, one of its checkpoints, or its .hydra."""
    path = Path(os.path.normpath(checked("--like", named).absolute()))
    run = next((folder for folder in (path, *path.parents[:2]) if (folder / ".hydra").is_dir()), None)
    if run is None:
        near = sorted(folder.parent for folder in path.parent.glob("*/.hydra"))
        works = " or ".join(f"--like={os.path.relpath(folder)}" for folder in near[-3:]) or "the folder of a run"
        raise BadInput([f"--like={named}: no run is there, which would have a folder .hydra; {works} would work"])
    typed, composed, of_hydra = (_load(run / ".hydra" / f"{name}.yaml") for name in ("overrides", "config", "hydra"))
    composed = composed if isinstance(composed, dict) else {}
    if not isinstance(typed, list) and not composed:
        files = "neither overrides.yaml nor config.yaml can be read in its .hydra"
        raise BadInput([f"--like={named}: {files}; the overrides themselves would work"])
    hydra = of_hydra["hydra"] if isinstance(of_hydra, dict) and isinstance(of_hydra.get("hydra"), dict) else {}
    recorded = [*((hydra.get("overrides") or {}).get("hydra") or []), *(typed or [])]
    overrides = [str(text) for text in recorded if key_of(str(text)) not in _OF_A_LAUNCH]
    runtime = hydra.get("runtime") or {}
    sources = runtime.get("config_sources") or []
    folders = [source["path"] for source in sources if source["provider"] == "command-line"]
    name = str((hydra.get("job") or {}).get("config_name") or OWN)
    earlier = _Earlier(
        run=run,
        overrides=overrides,
        options=Options(name, folders[0] if folders else None),
        config=_flat(composed),
        cwd=Path(runtime.get("cwd") or os.getcwd()),
        choices={
            group: str(name) for group, name in (runtime.get("choices") or {}).items() if group in _GROUPS and name
        },
    )
    try:
        if not isinstance(typed, list):
            raise BadInput([f"{run / '.hydra' / 'overrides.yaml'} cannot be read"])
        split_options(earlier.options.arguments)
    except BadInput as error:
        if not composed:
            raise BadInput([f"--like={named}: {problem}" for problem in error.problems]) from None
        earlier.options, earlier.overrides = Options(OWN, str(run / ".hydra")), []
        earlier.said.append(
            f"its own .hydra/config.yaml is taken, in which every key is set, since what that was composed from is "
            f"gone ({error.problems[0]})"
        )
    return earlier


def _load(path: Path) -> Any:
    """Load a YAML file of Hydra's as it stands; None where it is not there or cannot be read."""
    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return None


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted keys."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _without_its_place(earlier: _Earlier, own: Sequence[str]) -> None:
    """Leave out which run it was, for a command that is none; its presets stand over those of the command."""
    earlier.overrides = [text for text in earlier.overrides if key_of(text) not in ("name", "resume")]
    adds = [text for text in [*earlier.overrides, *own] if text.startswith("+") and "." not in key_of(text)]
    if earlier.options.file is None and not adds:  # else they stand in that file, or what is added chooses them
        chosen = {key_of(text) for text in earlier.overrides}
        earlier.overrides[:0] = [f"{group}={name}" for group, name in earlier.choices.items() if group not in chosen]


def _merged(earlier: _Earlier, own: list[str]) -> list[str]:
    """Merge the run's overrides with the command's own, which win; say which are taken and which are replaced."""
    options, later = _own_options(own)
    keys = {key_of(text) for text in later}
    replaced = _anew(earlier, later)
    kept: list[str] = []
    for text in earlier.overrides:
        key = key_of(text)
        section = key.partition(".")[0]
        by = [name for name in keys if name == key or key.startswith(f"{name}.")]
        by += [group for group in _GROUPS if group in keys and section == group]
        if text in replaced:
            continue
        (replaced if by else kept).append(text)
    kept = _from_here(earlier, kept, keys)
    if "resume=never" in kept:
        kept.remove("resume=never")
        earlier.said.append("not taken over: resume=never, which would start the run again")
    earlier.said.append(f"taken over: {' '.join(kept) or 'nothing but the defaults'}")
    if replaced:
        earlier.said.append(f"replaced by what this command says: {' '.join(replaced)}")
    _say_drift(earlier)
    return [*kept, *later, *(options.arguments or earlier.options.arguments)]


def _own_options(own: Sequence[str]) -> tuple[Options, list[str]]:
    """Split the command's own words, of which questions to Hydra (``--cfg job``) stay among the overrides."""
    return split_options(own, asks=True)


def _anew(earlier: _Earlier, later: Sequence[str]) -> list[str]:
    """Find the overrides that `init_from` and `uptrain` implied, where the command sets one of these anew."""
    recorded = {key_of(text): text for text in earlier.overrides}
    anew = [text for text in later if key_of(text) == "init_from" or key_of(text).startswith("uptrain.")]
    if "init_from" not in recorded or not anew:
        return []
    uptrained = any(key.startswith("uptrain.alpha") for key in recorded)
    try:
        config = compose_overrides([*earlier.overrides, *earlier.options.arguments]).config
        begins = open_source(_there(earlier.cwd, str(config.init_from)), checked=False, key="init_from")
        there = implied(config, begins, [])
        return [
            text
            for text in earlier.overrides
            if text in there or (uptrained and key_of(text).startswith(_BY_LENGTH))
        ]  # fmt: skip
    except BadInput:  # it is gone: by the sections alone
        sections = ("model.", "data.tokenizer", *(("data.", "optimizer.", "schedule.", "train.") if uptrained else ()))
        return [text for text in earlier.overrides if key_of(text).startswith(sections)]


def _from_here(earlier: _Earlier, kept: list[str], keys: set[str]) -> list[str]:
    """Write paths that were relative to where the run was started so that they are found from here."""
    if earlier.cwd == Path.cwd():
        return kept
    values = earlier.config or {key_of(text): _text_value(text) for text in kept}
    moved = {
        key: f"{key}={quoted(earlier.cwd / value)}"
        for key, value in values.items()
        if _PATHS.fullmatch(key) and not any(f"{key}.".startswith(f"{name}.") for name in keys)
        if isinstance(value, str) and not value.startswith(("/", "~", "$")) and (earlier.cwd / value).exists()
    }
    if moved:
        earlier.said.append(f"paths are those of {earlier.cwd}, where it was started: {' '.join(moved.values())}")
    return [*(text for text in kept if key_of(text) not in moved), *moved.values()]


def _there(cwd: Path, path: str) -> str:
    """Say what a path is that was given in a folder; a URL is the same from everywhere."""
    return path if is_url(path) else str(cwd / expanded(path))


def _text_value(override: str) -> Any:
    try:
        return OverridesParser.create().parse_override(override).value()
    except HydraException:
        return None


def _say_drift(earlier: _Earlier) -> None:
    """Say where the same overrides now compose to something else: other defaults, other files of the user's."""
    if not earlier.config:
        return
    try:
        composition = compose_overrides([*earlier.overrides, *earlier.options.arguments])
    except BadInput:
        return  # the command says it
    now = _flat(_plain(composition))
    drift = [
        f"{key}={now[key]} (it had {earlier.config[key]})"
        for key in now
        if key in earlier.config and _differs(earlier.config[key], now[key]) and key not in ("name", "preset")
    ]
    if drift:
        earlier.said.append(f"defaults or files have changed since: {', '.join(drift)}")
    if composition.problems:
        earlier.said.append(f"no longer known: {'; '.join(composition.problems)}")


def _plain(composition: Composition) -> dict[str, Any]:
    return dict(to_jsonable(asdict(composition.config)))


def _differs(then: Any, now: Any) -> bool:
    """Tell whether a value is another; one that was looked up elsewhere (``${…}``) is not compared."""
    return not (isinstance(then, str) and "${" in then) and then != now


def _as_the_run_or_another(earlier: _Earlier, taken: list[str], own: Sequence[str]) -> list[str]:
    """Let the run go on where the recipe is the same; leave its name and folder to it where that is another."""
    options, overrides = _own_options(taken)
    keys = {key_of(text) for text in _own_options(own)[1]}
    if keys & {"name", "hydra.run.dir"}:
        return taken
    changed = _changed_recipe(earlier, taken)
    if changed is None:  # the command says what is wrong
        return taken
    if not changed:
        earlier.said.append("the recipe is the same, so that this run goes on")
        return [*overrides, f"hydra.run.dir={quoted(earlier.run)}", *options.arguments]
    named = [text for text in overrides if key_of(text) == "name"]
    if options.config_dir == str(earlier.run / ".hydra") and "${" not in str(earlier.config.get("name", "${")):
        named = [f"name={earlier.config['name']}"]
        overrides.append("name='${run_name:}'")
    left = f"; its name is left to it ({named[0]})" if named else ""
    earlier.said.append(f"a run of its own, since the recipe is another: {', '.join(changed)}{left}")
    return [*(text for text in overrides if text not in named), *options.arguments]


def _changed_recipe(earlier: _Earlier, taken: list[str]) -> list[str] | None:
    """List the keys of the recipe that differ from the run's; None where that cannot be told."""
    register()
    try:
        composition, _, _ = compose_with_source(taken, checked=False)
        then = OmegaConf.load(earlier.run / ".hydra" / "config.yaml")
        before = recipe_fields(OmegaConf.to_container(then, resolve=True))  # type: ignore[arg-type]
    except (BadInput, OSError, ValueError, YAMLError, OmegaConfBaseException, KeyError, AttributeError):
        return None
    if composition.problems:
        return None
    now, before = _flat(recipe_fields(_plain(composition))), _flat(before)

    def value(key: str, values: Mapping[str, Any], cwd: Path) -> Any:
        found = values.get(key)
        return _there(cwd, found) if _PATHS.fullmatch(key) and isinstance(found, str) else found

    return [key for key in sorted({*now, *before}) if value(key, now, Path.cwd()) != value(key, before, earlier.cwd)]
