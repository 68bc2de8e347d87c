"""The files of a Hugging Face directory: which of them hold the weights, what their headers say, what is wrong there.

Which files are read is decided as `transformers` decides it, by their names.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from model.weights import few

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = ("F32", "BF16", "F16", "F64")
"""What weights are stored as."""
_ADAPTER = "adapter_config.json"
_KINDS = (".safetensors", ".safetensors.index.json")
_PICKLES = (".bin", ".pt", ".pth")
_NO_WEIGHTS = ("training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state")
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Place:
    """Where a tensor is stored, and as what."""

    file: str
    key: str
    shape: list[int]
    dtype: str


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ValueError: there is none in it; in a sentence with its path.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON ({_of_pointer(path) or error}); the whole file would work") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {shown(content)}, which is no JSON object; one would work")
    return content


def chosen_files(folder: Path, theirs: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The file, or the index of files, that `transformers` takes weights from, and an index's file of each tensor.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if (folder / _ADAPTER).is_file():
        raise ValueError(f"{folder / _ADAPTER}: adapters are not added to weights; the model with it merged would work")
    named = theirs.get("transformers_weights")
    if named is not None and not (
        isinstance(named, str) and named.endswith((".safetensors", ".safetensors.index.json"))
    ):
        raise ValueError(f"{folder / 'config.json'}: transformers_weights={shown(named)}: names no safetensors file")
    names = (SINGLE, INDEX) if named is None else (named,)
    chosen = next((name for name in names if _inside(name) and (folder / name).is_file()), None)
    if chosen is None:
        others = weight_files(folder)
        pickles = [name for name in others if name.endswith(_PICKLES)]
        hint = f"; {others[0]} is, and is under no such name" if others else ""
        if pickles and len(pickles) == len(others):
            hint = f"; {pickles[0]} is a pickle, which can run code, and is not read"
        raise ValueError(f"{folder}: no {' or '.join(names)} is there{hint}")
    if not chosen.endswith(".json"):
        return chosen, {}
    weight_map = read_object(folder / chosen).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(at, str) for at in weight_map.values()):
        raise ValueError(
            f"{folder / chosen}: has no weight_map, which says what file each tensor is in; one would work"
        )
    if outside := sorted({at for at in weight_map.values() if not _inside(at)}):
        raise ValueError(f"{folder / chosen}: {outside[0]} lies outside the folder; files in it would work")
    return chosen, weight_map


def headers(folder: Path, chosen: str, weight_map: dict[str, str]) -> tuple[dict[str, Place], set[str], list[str]]:
    """Where every tensor is, those that were in files that cannot be read, and what is wrong with the files."""
    problems: list[str] = []
    found: dict[str, Place] = {}
    unread = set()
    for name in sorted(set(weight_map.values())) or [chosen]:
        path = folder / name
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    if key in found:
                        problems.append(f"{path}: {key} is in {found[key].file} as well; one of them would work")
                    part = file.get_slice(key)
                    found[key] = Place(name, key, part.get_shape(), part.get_dtype())
        except (OSError, SafetensorError) as error:
            unread.add(name)
            held = sum(at == name for at in weight_map.values())
            whose = f", which {chosen} says holds {held} tensors" if weight_map else ""
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or "cannot be read"
            why = _of_pointer(path) or (reason if path.exists() else "is not there")
            problems.append(f"{path}: {why}{whose}")
    lost = {key for key, name in weight_map.items() if name in unread}
    absent = {key: name for key, name in weight_map.items() if key not in found and key not in lost}
    problems += few([f"{folder / name}: {key} is not in it, and {chosen} says so" for key, name in absent.items()])
    return found, lost | absent.keys(), problems


def tie(folder: Path, found: dict[str, Place], embedding: str, head: str) -> list[str]:
    """Give head and embedding the place of the one that is there; what is wrong where both are, and differ."""
    there = [found[key] for key in (embedding, head) if key in found]
    if any(at.dtype not in FLOATS for at in there):  # which is refused for that
        return []
    if len(there) == 2:
        values = []
        for at in there:
            with safe_open(folder / at.file, framework="pt") as file:
                values.append(file.get_tensor(at.key))
        one, two = values
        if one.shape != two.shape or not (one.eq(two) | (one.isnan() & two.isnan())).all():
            return [f"{folder / 'config.json'}: tie_word_embeddings=true: {head} and {embedding} are both there, and "
                    "differ; tie_word_embeddings=false would take both"]  # fmt: skip
    if there:
        found[embedding] = found[head] = there[0]
    return []


def weight_files(folder: Path) -> list[str]:
    """The files of a folder that are weights by their names."""
    kinds = (*_KINDS, ".gguf", *_PICKLES)
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name.endswith(kinds) and not path.name.startswith(_NO_WEIGHTS) and path.is_file()
    )


def beside(folder: Path, chosen: str, read: set[str]) -> list[str]:
    """Say what other weights are in the folder, which are not read."""
    if others := [name for name in weight_files(folder) if name not in read and name != chosen]:
        return [
            f"{folder}: {chosen} is read, as transformers does; other weights beside it are not: {', '.join(others)}"
        ]
    return []


def _inside(name: str) -> bool:
    """Whether a name is of a file below the folder; a link there, as in a cache of downloads, may lead out."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.name != ""


def _of_pointer(path: Path) -> str:
    """What to say of a file that Git LFS has not fetched; nothing of any other."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            return "is what Git LFS keeps in its place: git lfs pull would fetch it"
    return ""


def shown(value: Any) -> str:
    """A value of a JSON file in a sentence."""
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
