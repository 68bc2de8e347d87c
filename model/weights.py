"""Weights on disk, by full parameter name, read and written one tensor at a time: a model may be larger than memory.

They lie in safetensors files, which hold numbers and no code, whoever wrote them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import nn

from model.config import ModelConfig
from model.transformer import full_shapes, layer_builders

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
EMBEDDING, HEAD = "embedding.tokens.weight", "head.proj.weight"
FEW = 12
"""Lines of one kind of problem that are said one by one."""


class Weights(Protocol):
    """A source of the parameters of a model."""

    @property
    def config(self) -> ModelConfig:
        """The shape of the model."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter by its full name, on the CPU, in the dtype that it is stored in."""
        ...


@dataclass(frozen=True)
class StoredWeights:
    """Parameters in the safetensors files of a folder.

    Attributes:
        config: the shape of the model.
        folder: where the files are.
        tensors: per full name its ``shape`` and its ``pieces``: ``offset`` and ``shape`` in the whole, ``file``, and
            ``key`` in that file.
        notes: what of the folder is not taken as it lies there, a sentence each.
    """

    config: ModelConfig
    folder: Path
    tensors: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...] = ()

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding: one tensor on disk is both."""
        embedding, head = self.tensors.get(EMBEDDING), self.tensors.get(HEAD)
        return embedding is not None and head is not None and embedding["pieces"] == head["pieces"]

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter, put together from its pieces; what is stored in fp64 comes in fp32."""
        entry = self.tensors[name]
        whole: torch.Tensor | None = None
        for piece in entry["pieces"]:
            with safe_open(self.folder / piece["file"], framework="pt") as file:
                part = _at_most_fp32(file.get_tensor(piece["key"]))
            if part.shape == torch.Size(entry["shape"]):
                return part
            whole = part.new_empty(entry["shape"]) if whole is None else whole
            place = whole
            for dim, (at, size) in enumerate(zip(piece["offset"], piece["shape"], strict=True)):
                place = place.narrow(dim, at, size)
            place.copy_(part)
        assert whole is not None
        return whole


def stored_dtype(weights: StoredWeights) -> torch.dtype:
    """The narrowest dtype that holds every stored weight as it is, of those that are written."""
    found = {_at_most_fp32(part).dtype for _, _, part in _parts(weights, rows=0)}
    return reduce(torch.promote_types, found)


def not_finite(weights: StoredWeights) -> list[str]:
    """Name every stored tensor with a NaN or an infinity in it, a sentence each; all of them are read."""
    lines = []
    for file, key, part in _parts(weights):
        least, most = torch.aminmax(_at_most_fp32(part))  # a NaN anywhere makes both NaN
        if not (least.isfinite() and most.isfinite()):
            kind = "NaN" if most.isnan() else "infinite values"
            lines.append(f"{weights.folder / file}: {key} holds {kind}; weights that are all finite would work")
    return few(lines)


def few(lines: Sequence[str]) -> list[str]:
    """The first lines of a kind, and how many more there are."""
    rest = len(lines) - FEW
    return [*lines] if rest <= 1 else [*lines[:FEW], f"and {rest} more like the last"]


def _parts(weights: StoredWeights, rows: int | None = None) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Each stored piece once, with its file and key; only so many rows of it where `rows` is given."""
    places = {(piece["file"], piece["key"]) for entry in weights.tensors.values() for piece in entry["pieces"]}
    for name, group in groupby(sorted(places), key=lambda place: place[0]):
        with safe_open(weights.folder / name, framework="pt") as file:
            for _, key in group:
                yield name, key, file.get_slice(key)[:rows]


def _at_most_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.float64 else tensor


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        key: its name in the file.
        dtype, shape: of the tensor in the file; the file's header, which comes before all data, needs them.
        value: reads or computes the tensor when it is written; the result is converted to `dtype`.
    """

    key: str
    dtype: torch.dtype
    shape: Sequence[int]
    value: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Number of bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def entries(weights: Weights, dtype: torch.dtype, key: Callable[[str], str] = str) -> list[Entry]:
    """An entry for every parameter of a model, in the order of its layers; each is read when it is written.

    Args:
        weights: of a model of any size.
        dtype: of the tensors in the file.
        key: from a parameter's full name to its name in the file.
    """
    return [
        Entry(key(name), dtype, shape, partial(weights.read, name))
        for name, shape in full_shapes(weights.config).items()
    ]


def write_safetensors(path: Path, tensors: Sequence[Entry]) -> dict[str, Any]:
    """Write a safetensors file, one tensor in memory at a time, durable when this returns.

    Returns:
        ``bytes`` and ``sha256`` of the file, the latter computed on the way.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in tensors:
        end = at + entry.num_bytes
        header[entry.key] = {"dtype": _DTYPES[entry.dtype], "shape": [*entry.shape], "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()

    def parts() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little")
        yield text
        for entry in tensors:
            tensor = entry.value().to(entry.dtype).contiguous()
            assert tensor.shape == torch.Size(entry.shape), entry.key
            yield tensor.view(-1).view(torch.uint8).numpy()

    with open(path, "wb") as file:
        for part in parts():
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def shards(tensors: Iterable[Entry], max_bytes: int) -> list[list[Entry]]:
    """Consecutive entries in files of at most `max_bytes` of data, or of one tensor that is larger."""
    cut: list[list[Entry]] = []
    room = 0
    for entry in tensors:
        if not cut or entry.num_bytes > room:
            cut.append([])
            room = max_bytes
        cut[-1].append(entry)
        room -= entry.num_bytes
    return cut


@torch.no_grad()
def streamed_logits(weights: Weights, tokens_BL: torch.Tensor) -> torch.Tensor:
    """Logits of the whole model with one layer in memory at a time.

    Args:
        weights: of a model of any size.
        tokens_BL: int64 (B, L), on the CPU.

    Returns:
        fp32 (B, L, V).
    """
    x = tokens_BL
    for _, layer in loaded_layers(weights):
        x = layer(x)
    return x


def loaded_layers(weights: Weights) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers in order, each with its name, on the CPU in fp32, built and loaded when it is asked for."""
    for name, build in layer_builders(weights.config).items():
        with torch.device("meta"):
            layer = build()
        layer.to_empty(device="cpu")
        with torch.no_grad():
            for inner, parameter in layer.named_parameters():
                parameter.copy_(weights.read(f"{name}.{inner}"))
        yield name, layer
