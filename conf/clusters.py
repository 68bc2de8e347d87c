"""The cluster that a plan is for, by a size and a preset or by a file: ``32x8xh100``, ``h100``, ``cluster.yaml``."""

from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.paths import expanded
from model.problems import BadInput, either
from parallel.plan.cluster import Cluster, size_problems

_FOLDER = Path(__file__).parent / "clusters"


def presets() -> list[str]:
    """Return the names of the presets."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def cluster_of(spec: str) -> Cluster:
    """Return the cluster that a user names.

    Args:
        spec: ``NODESxGPUSxPRESET``, ``NODESxGPUSxFILE.yaml``, a preset, or a YAML file with the keys of
            `parallel.plan.cluster.Cluster`; a file may say ``preset: h100`` for the keys that it leaves out.

    Raises:
        BadInput: the size is none, there is no such preset or file, or the file has what a cluster has not.
    """
    parts = spec.split("x", 2)
    sized = len(parts) == 3 and (parts[0].isdecimal() or Path(spec).suffix not in (".yaml", ".yml"))
    kind = parts[2] if sized else spec
    problems = size_problems(spec, *parts[:2]) if sized else []
    try:
        cluster = _loaded(kind, spec)
    except BadInput as error:
        raise BadInput([*problems, *error.problems]) from None
    if problems:
        raise BadInput(problems)
    if sized:
        cluster.nodes, cluster.gpus_per_node = int(parts[0]), int(parts[1])
        if found := cluster.problems(f"--cluster={spec}: cluster"):
            raise BadInput(found)
    return cluster


def cluster_from_file(path: Path, said: str | None = None) -> Cluster:
    """Return the cluster of a YAML file.

    Args:
        path: the file.
        said: how the user named it, for messages; None for the path.

    Raises:
        BadInput: the file cannot be read, or has what a cluster has not.
    """
    said = said or str(path)
    try:
        content = OmegaConf.load(path)
        if not isinstance(content, DictConfig):
            raise ValueError("is no mapping of keys to values")
        values = dict(content)
        preset = values.pop("preset", None)
        if preset is not None and str(preset) not in presets():  # a file is no preset of a file: it might be of itself
            raise BadInput([_no_preset(str(preset), said)])
        base = OmegaConf.structured(cluster_of(str(preset)) if preset is not None else Cluster)
        if unknown := [str(key) for key in values if key not in {one.name for one in fields(Cluster)}]:
            raise BadInput([_unknown_key(said, key) for key in unknown])
        cluster = OmegaConf.to_object(OmegaConf.merge(base, OmegaConf.create(_as_floats(values))))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise BadInput(
            [f"--cluster={said}: {reason}; a file that begins with `preset: h100` and sets what differs would work"]
        ) from None
    assert isinstance(cluster, Cluster)
    if problems := cluster.problems(f"--cluster={said}: cluster"):
        raise BadInput(problems)
    return cluster


def _as_floats(value: Any, inside: bool = False) -> Any:
    """Return values with the whole numbers inside lists as floats: OmegaConf converts them elsewhere alone."""
    if isinstance(value, (dict, DictConfig)):
        return {key: _as_floats(one) for key, one in value.items()}
    if isinstance(value, (list, ListConfig)):
        return [_as_floats(one, inside=True) for one in value]
    return float(value) if inside and type(value) is int else value


def _loaded(kind: str, spec: str) -> Cluster:
    if kind in presets():
        return cluster_from_file(_FOLDER / f"{kind}.yaml", spec)
    path = expanded(kind)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return cluster_from_file(path, spec)
    raise BadInput([_no_preset(kind, spec)])


def _no_preset(kind: str, spec: str) -> str:
    close = get_close_matches(kind.lower(), presets(), n=1, cutoff=0.5)
    works = f"{close[0]} would work; there are" if close else "one of these or a file FILE.yaml would work:"
    return f"--cluster={spec}: no such preset as {kind!r}; {works} {', '.join(presets())}"


def _unknown_key(said: str, key: str) -> str:
    names = [one.name for one in fields(Cluster)]
    works = either("key", get_close_matches(key, names, n=2)) or "the keys of `parallel.plan.cluster.Cluster`"
    return f"--cluster={said}: cluster.{key}: is no key of a cluster; {works} would work"
