"""A plan as a configuration of the user's own, to train with (`--write`)."""

import shlex
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from conf.compose import Composition, compose_overrides
from conf.overrides import key_of
from conf.paths import expanded
from conf.search import OWN, Options, split_options
from launch.plan.request import Request, overrides_of
from launch.plan.rows import Row, gib
from model.problems import BadInput

_MARK = "# deepnarrow plan"
_EXPERIMENT = "experiment"
"""A file in a folder of this name is a group's, for ``+experiment=NAME``; any other is a primary config."""


def checked(request: Request, path: Path) -> None:
    """Check that a plan can be written to a file, before it is made.

    Raises:
        BadInput: the file's name is none for a configuration, or it is there and is not a plan's.
    """
    said = f"--write={path}"
    if path.suffix != ".yaml":
        raise BadInput([f"{said}: a configuration ends in .yaml; {path.with_suffix('.yaml')} would work"])
    if path.stem == OWN:
        raise BadInput([f"{said}: would hide the package's own {OWN}.yaml; {path.with_name('plan.yaml')} would work"])
    if not path.stem.replace("-", "").replace("_", "").isalnum():
        raise BadInput([f"{said}: a name of letters, digits, _ and - would work"])
    if not path.absolute().parent.is_dir():
        raise BadInput([f"{said}: {path.absolute().parent} is no folder; one that is there would work"])
    config_dir = split_options(request.arguments)[0].config_dir
    if _is_group(path) and config_dir is not None and expanded(config_dir).absolute() != path.absolute().parent.parent:
        works = expanded(config_dir) / _EXPERIMENT / path.name
        raise BadInput([f"{said}: an experiment lies in the folder of --config-dir; {works} would work"])
    try:
        kept = path.is_dir() or (path.exists() and _MARK not in path.read_text("utf-8")[:200])
    except (OSError, UnicodeDecodeError):
        kept = True
    if kept:
        raise BadInput([f"{said}: is there, and no plan has written it; another name would work"])


def write(request: Request, row: Row, path: Path) -> str:
    """Write a row of a plan as a configuration with all that the command has set, and return how to train with it.

    Raises:
        BadInput: the file cannot be written.
    """
    composition = compose_overrides(request.arguments)
    options, overrides = split_options(request.arguments)
    is_group, folder = _is_group(path), path.absolute().parent
    folder = folder.parent if is_group else folder
    content: dict[str, Any] = {"defaults": _defaults(request, options, overrides, is_group)}
    if options.config_dir is not None and expanded(options.config_dir).absolute() != folder:
        content["hydra"] = {"searchpath": [f"file://{expanded(options.config_dir).absolute()}"]}
    body = _nested(composition, overrides, overrides_of(row.candidate.choice))
    text = ("# @package _global_\n" if is_group else "") + f"{_head(request, row)}\n"
    text += OmegaConf.to_yaml(OmegaConf.merge(content, body), sort_keys=False)
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise BadInput([f"--write={path}: {error.strerror}"]) from None
    named = f"--config-name {path.stem}"
    if is_group:
        named = f"+{_EXPERIMENT}={path.stem}" + f" --config-name {options.config_name}" * (options.config_name != OWN)
    return f"deepnarrow train --config-dir {shlex.quote(str(folder))} {named}"


def _is_group(path: Path) -> bool:
    return path.absolute().parent.name == _EXPERIMENT


def _head(request: Request, row: Row) -> str:
    cluster, prediction = request.cluster, row.candidate.prediction
    return (
        f"{_MARK}: {prediction.seconds:,.4g} s a step predicted on {cluster.nodes} x {cluster.gpus_per_node} "
        f"{cluster.name}, {prediction.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, {gib(row.peak.num_bytes)} GiB"
    )


def _defaults(request: Request, options: Options, overrides: list[str], is_group: bool) -> list[Any]:
    """Return the defaults list: what the command composes from, its presets, and the groups that it adds."""
    presets = [{f"override /{group}": name} for group, name in request.groups.items()]
    added = [text for text in overrides if text.startswith("+") and "." not in key_of(text)]
    groups = [{f"/{key_of(text)}": text.partition("=")[2]} for text in added]
    if is_group:
        return [*groups, *presets]
    own = [] if options.config_name == OWN else [options.config_name.removesuffix(".yaml")]
    builds_on = OWN
    if own and options.file is not None and "defaults" in OmegaConf.load(options.file):
        builds_on, own = own[0], []  # which says itself what it builds on
    return [builds_on, *own, *groups, *presets, "_self_"]  # Hydra wants those that override at the end


def _nested(composition: Composition, overrides: list[str], chosen: list[str]) -> Any:
    """Return the values that the command has set by key, and those that were chosen for it."""
    found = OmegaConf.create({})
    for text in overrides:
        key = key_of(text)
        if key not in composition.node.hydra.runtime.choices:
            value = OmegaConf.select(composition.node, key, throw_on_resolution_failure=False)
            node = _node(composition, key)
            OmegaConf.update(found, key, node if isinstance(node, str) and "${" in node else value, force_add=True)
    for text in chosen:
        key, _, value = text.partition("=")
        OmegaConf.update(found, key, int(value) if value.isdecimal() else value, force_add=True)
    return found


def _node(composition: Composition, key: str) -> Any:
    """Return the value of a key as it was written, interpolations among it."""
    section, _, leaf = key.rpartition(".")
    parent = OmegaConf.select(composition.node, section) if section else composition.node
    node = parent._get_node(leaf)
    return None if node is None else node._value()
