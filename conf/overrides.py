"""Overrides are judged one by one where a command line does not compose: what is wrong with each, and what works."""

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from conf.nearest import nearest_keys, nearest_names
from conf.schema import Config
from conf.search import Primary, keys_of
from model.problems import either

# Hydra raises a bare ValueError for a group set to no name (model=null), and lets YAML's and the disk's errors through.
IMPOSSIBLE = (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError)
_ONE_RUN = "for several runs, a command for each would work (--multirun is not how runs are started here)"


@dataclass
class Sifted:
    """Overrides that can be applied, and what is wrong with the others.

    Attributes:
        sound: overrides that can be applied together.
        problems: one sentence for each of the others.
        refused: the keys that the others would have set.
    """

    sound: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def sift(overrides: Sequence[str], defaults: DictConfig, compose: Callable[[list[str]], object]) -> Sifted:
    """Sift the overrides that can be applied from the others.

    Args:
        overrides: of the command line.
        defaults: composed without any.
        compose: composes overrides to the end, and raises one of `IMPOSSIBLE` where that fails.
    """
    # Groups first: which keys a value override may name does not depend on it here, but its preset's values do.
    ordered = sorted(overrides, key=lambda text: "." in text.partition("=")[0])
    problems = {text: _malformed(text, defaults) or _judge(_parsed(text), defaults) for text in ordered}
    sound = [text for text in ordered if problems[text] is None]
    try:
        compose(sound)
    except IMPOSSIBLE:
        applied: list[str] = []
        for text in sound:
            try:
                compose([*applied, text])
                applied.append(text)
            except IMPOSSIBLE as error:
                problems[text] = f"{text}: {one_line(error, _parsed(text))}"
        sound = applied
    refused = [text for text in ordered if problems[text] is not None]
    return Sifted(sound, [problems[text] or "" for text in refused], [key_of(text) for text in refused])


def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def key_of(override: str) -> str:
    """Return the key or group that an override names, by its text: ``model`` of ``+model@x=7b``."""
    return override.partition("=")[0].lstrip("+~/").partition("@")[0]


def is_group(key: str) -> bool:
    """Tell whether a key is that of a folder of presets."""
    return bool(key.strip("/")) and "." not in key and bool(_options(key))


def _options(group: str) -> list[str]:
    return list(GlobalHydra.instance().config_loader().get_group_options(group))


def without_effect(overrides: Sequence[str], primary: Primary) -> dict[str, str]:
    """Say of each override that would be taken and do nothing, in a sentence, why that is.

    Args:
        overrides: of the command line.
        primary: what they are composed onto; what its file sets stands over what presets set.
    """
    found = {}
    for text in overrides:
        if primary.sets and text[:1] not in ("+", "~") and (problem := _hidden(text, primary)):
            found[text] = problem
        key, _, value = text.lstrip("+").partition("=")
        if key == "hydra.mode" and value.strip("'\"") != "RUN":
            found[text] = f"{text}: a command is one run; {_ONE_RUN}"
        if key == "hydra.searchpath":
            folders = [Path(path.partition("://")[2] or path) for path in re.findall(r"[^\s,\[\]'\"]+", value)]
            if "pkg://" not in value and (missing := [folder for folder in folders if not folder.is_dir()]):
                found[text] = f"{text}: {missing[0]} is no folder; one of YAML files would work, or --config-dir"
    return found


def _malformed(text: str, defaults: DictConfig) -> str | None:
    """Say why a word is no override, or holds several values; None where it is one."""
    key, equals, value = text.partition("=")
    if not text.strip():
        return f"{text!r}: an empty word; key=value would work (a variable of the shell that is not set?)"
    if not key.lstrip("+~/@ "):
        return f"{text}: has no key; key=value would work"
    if key.startswith("/"):
        return f"{text}: {text.lstrip('/')} would work, without the /"
    if not equals and not key.startswith("~"):
        groups = [group for group in ("model", "data", "schedule") if text in _options(group)]
        if groups:
            return f"{text}: not an override; {either(groups[0], [text])} would be"
        known = OmegaConf.select(defaults, text.lstrip("+"), default=_MISSING) is not _MISSING
        return f"{text}: {'has no value' if known else 'not an override'}; write key=value"
    try:
        parsed = _parsed(text)
    except HydraException:
        # Hydra reads =, commas, brackets, a leading ~ and letters beyond ASCII inside quotes only, and the shell takes
        # one pair of them away.
        plain = value[:1] not in ("[", "{", '"', "'")
        example = ", such as " + shlex.quote(f'{key}="{value}"') if plain else ""
        return f"{text}: Hydra cannot read this value; quotes around its text that the shell leaves in place{example}, would work"  # noqa: E501  # fmt: skip
    return _several(text, defaults) if parsed.is_sweep_override() else None


def _several(text: str, defaults: DictConfig) -> str:
    """Say what works in place of several values: a,b, or choice, range, interval and glob."""
    key, _, value = text.partition("=")
    node = _node(defaults, key.lstrip("+"))
    if isinstance(node, ListConfig):
        return f"{text}: several values, one run each to Hydra; {key}=[{value}] would work, as one list"
    simple = re.match(r"\w+\(", value) is None
    one = f", such as {key}={value.partition(',')[0]}," if simple else ""
    whole = shlex.quote(f'{key}="{value}"')
    quotes = f" (or {whole}, as one text)" if isinstance(node, StringNode) else ""
    return f"{text}: several values, one run each to Hydra; one value{one} would work{quotes}; {_ONE_RUN}"


def _judge(override: Override, defaults: DictConfig) -> str | None:
    """Say what is wrong with an override that can be read, as far as that needs no composition."""
    text, key = override.input_line or "", override.key_or_group
    value = text.partition("=")[2]
    if override.package is not None and is_group(key):
        return f"{text}: presets know what they set; {key}={value} would work, without the @"
    if is_group(key):
        return _judge_preset(override, text, value, defaults)
    if OmegaConf.select(defaults, key, default=_MISSING) is _MISSING and not _names_of_users(defaults, key):
        if "." not in key and override.is_add():
            return f"{text}: no such group of presets, nor key; --config-dir=DIR of a folder with {key}/ would work{_near(key, defaults)}"  # noqa: E501  # fmt: skip
        return f"{text}: no such key; {_near(key, defaults).strip('; ') or '--cfg job lists all keys'}"
    if override.is_delete():
        node = _node(defaults, key)
        null = f"{key}=null or " if node is not None and node._is_optional() else ""
        return f"{text}: settings are not deleted; {null}leaving it out would work"
    if override.is_add() and not _names_of_users(defaults, key):
        return f"{text}: there is this key already; {key}={value} would work, without the +"
    return None


def _judge_preset(override: Override, text: str, value: str, defaults: DictConfig) -> str | None:
    group, options = override.key_or_group, _options(override.key_or_group)
    chosen = group in defaults.hydra.runtime.choices
    if override.is_delete():
        if not value or value == defaults.hydra.runtime.choices.get(group):
            return None
        return f"{text}: is not what is chosen; ~{group} would work"
    names = override.value()
    wanted = [str(name) for name in names] if isinstance(names, list) else [value.strip("'\"")]
    if missing := [name for name in wanted if name not in options]:
        sign = "+" if override.is_add() or not chosen else ""
        near = nearest_names(missing[0], options)
        hint = f"did you mean {' or '.join(f'{sign}{group}={name}' for name in near)}? " if near else ""
        return f"{text}: no such preset; {hint}There are {', '.join(sorted(options))}"
    if chosen and text.startswith("+"):
        return f"{text}: there is a choice already; {group}={value} would work, without the +"
    if not chosen and not override.is_add():
        return f"{text}: {group} is not among what is chosen from by default; +{group}={value} would work"
    return None


def _hidden(text: str, primary: Primary) -> str | None:
    """Say that a preset would change nothing of its section, since the primary config sets the same keys over it."""
    group, equals, value = text.partition("=")
    if not equals or not is_group(group):
        return None
    names = [name.strip(" '\"") for name in value.strip("[]").split(",")]
    loader: Any = GlobalHydra.instance().config_loader()
    loaded = [loader.repository.load_config(f"{group}/{name}") for name in names]
    contents = [OmegaConf.to_container(found.config) for found in loaded if found is not None]
    sections = [content.get(group, content) for content in contents if isinstance(content, dict)]
    sets = {f"{group}.{key}" for section in sections for key in keys_of(section)}
    if not sets or not sets <= primary.sets:
        return None
    own = primary.file is not None and primary.file.parent.name == ".hydra"
    like = f", or --like={primary.file.parent.parent} {text} in place of --config-dir" if own and primary.file else ""
    return f"{text}: {primary.file} sets the same keys over it; {group}.KEY=value would work{like}"


_MISSING = object()


def _node(defaults: DictConfig, key: str) -> Any:
    """Return the node of a key, None where there is none."""
    section, _, leaf = key.rpartition(".")
    parent = OmegaConf.select(defaults, section) if section else defaults
    return parent._get_node(leaf) if isinstance(parent, DictConfig) and leaf in parent else None


def _names_of_users(defaults: DictConfig, key: str) -> bool:
    """Tell whether a key stands in a section whose keys are names that the user gives."""
    sections = [key.rsplit(".", depth)[0] for depth in range(1, key.count(".") + 1)]
    nodes = [OmegaConf.select(defaults, section, default=None) for section in sections]
    return any(isinstance(node, DictConfig) and OmegaConf.is_struct(node) is False for node in nodes)


def _near(key: str, defaults: DictConfig) -> str:
    near = nearest_keys(key, _keys(defaults))
    return f"; did you mean {' or '.join(near)}?" if near else ""


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


def _wrong_in_file(group: str, lines: Sequence[str]) -> str:
    """Say what Hydra finds wrong in a file of a group; without `# @package _global_` its keys are the group's."""
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    known = _keys(OmegaConf.structured(Config))
    if group and (key == group or key.removeprefix(f"{group}.") in known or f"@{group}." in lines[0]):
        return f"its keys are taken for those of section {group}; `# @package _global_` as its first line would work"
    if re.match("Key '.+' not in ", lines[1]) and key:
        near = " or ".join(nearest_keys(key, known))
        return f"{key}: no such key; {f'did you mean {near}?' if near else '--cfg job lists all keys'}"
    return lines[1][0].lower() + lines[1][1:]


def one_line(error: Exception, override: Override | None = None) -> str:
    """Say the innermost cause in one sentence: Hydra wraps OmegaConf's reason in a longer and emptier one.

    Args:
        error: of Hydra, OmegaConf or YAML.
        override: what was being applied, for what would work in its place.
    """
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: {error.problem}; YAML of keys and values would work"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if (match := re.match(r"In '(.+)': (\w+ raised while composing config:|.*)$", text)) and len(lines) > 1:
        text = f"in {match[1]}.yaml: {_wrong_in_file(match[1].rpartition('/')[0], lines)}"
    text = re.sub(r"^\w+ raised while resolving interpolation: ", "", text)
    key = override.key_or_group if override else ""
    if match := re.search(r"could not be converted to (\w+)$", text):
        kinds = {"Integer": "an integer", "Float": "a number", "Boolean": "true or false"}
        return f"must be {kinds.get(match[1], match[1])}"
    if override and "is not a ListConfig, list or tuple" in text:
        return f"must be a list; {key}=[{(override.input_line or '').partition('=')[2]}] would work"
    named = re.match(r"(data\.sources|eval\.sets)\.([^.]+)\.?(.*)", key)
    if override and named and re.search(r"is not a subclass of (SourceConfig|NamedCorpus)", text):
        section, name, leaf = named.groups()
        value = (override.input_line or "").partition("=")[2]
        made = f"{{{leaf}: {value}}}" if leaf else value
        what = section.rpartition(".")[2].removesuffix("s")
        return f"there is no {what} {name} yet; {section}={{{name}: {made}}} would make it"
    if override and "is not a subclass of" in text and "." not in key:
        return f"{key} is a section; {key}.KEY=value would set one of its keys"
    if override and "is not Optional" in text:
        return "cannot be null; another value, or leaving it out, would work"
    return text if text[1:2].isupper() else text[0].lower() + text[1:]
