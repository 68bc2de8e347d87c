"""Storage of PyTorch's distributed checkpoint (DCP): one safetensors file per rank.

DCP plans which rank writes what, once where several hold it, refuses a plan with gaps or overlaps, carries one rank's
failure to all, and computes which parts of which pieces a rank of another layout has to read. Its own files are
pickles; these are not.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from model.weights import Entry, write_safetensors
from parallel.state import Box, Piece
from train.health import all_finite

DTYPE = torch.float32


class NotFinite(Exception):
    """The state of a run holds numbers that are not finite: it is no checkpoint to go on from."""


class SavePieces(DefaultSavePlanner):
    """Plans to write what each rank owns; the state dict is of `Piece`s."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """Plan to write this rank's boxes."""
        properties = TensorProperties(dtype=DTYPE)
        self.plan = SavePlan(
            [
                WriteItem(
                    MetadataIndex(name, torch.Size(box.offsets)),
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(_chunk(box), properties, piece.shape),
                )
                for name, piece in self.state_dict.items()
                for box in piece.boxes
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """The values of one box."""
        return _values(self.state_dict, index)


class LoadPieces(DefaultLoadPlanner):
    """Plans to fill what each rank owns; the state dict is of `Piece`s."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keep what is to be filled as it is; the default would replace what is no tensor."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Plan to read the parts of stored pieces that overlap this rank's boxes."""
        assert self.metadata is not None
        items = []
        for name, piece in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata) and stored.size == piece.shape, name
            items += create_read_items_for_chunk_list(name, stored, [_chunk(box) for box in piece.boxes])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The values of one box."""
        return _values(self.state_dict, index)


class Writer(StorageWriter):
    """Writes a checkpoint's files, durable when DCP's save returns; what one rank cannot write, none has saved.

    Args:
        folder: is made.
        rank: of this process; names its file.
        commit: called on one rank when all have written, with the tensors and files of the manifest.
    """

    def __init__(self, folder: Path, rank: int, commit: Callable[[dict[str, Any], dict[str, Any]], None]):
        self._folder, self._name, self._commit = folder, f"rank{rank:05d}.safetensors", commit

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Keep the plan as it is, and make the folder if no other rank has."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As planned."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file."""
        written: Future[list[WriteResult]] = Future()
        written.set_result(self._write(plan, planner) if plan.items else [])
        return written

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        tensors = [cast(torch.Tensor, planner.resolve_data(item)) for item in plan.items]
        for item, tensor in zip(plan.items, tensors, strict=True):
            if not all_finite([tensor]):
                raise NotFinite(f"{item.index.fqn} is not finite, and such a state is no checkpoint")
        entry = write_safetensors(
            self._folder / self._name,
            [
                Entry(_key(item.index), DTYPE, tensor.shape, partial(torch.Tensor.detach, tensor))
                for item, tensor in zip(plan.items, tensors, strict=True)
            ],
        )
        return [
            WriteResult(item.index, tensor.nbytes, (self._name, entry, list(tensor.shape)))
            for item, tensor in zip(plan.items, tensors, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Hand over to `commit`, on one rank, what was written where."""
        tensors: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            tensors[name] = {"shape": list(stored.size), "pieces": []}
        for result in (result for of_rank in results for result in of_rank):
            file, entry, shape = result.storage_data
            files[file] = entry
            piece = {"offset": list(result.index.offset or ()), "shape": shape, "file": file, "key": _key(result.index)}
            tensors[result.index.fqn]["pieces"].append(piece)
        self._commit(tensors, files)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any folder."""
        return True


class Reader(StorageReader):
    """Reads slices out of a checkpoint's files; only the slices that were planned are read.

    Args:
        folder: of the files.
        tensors: what lies where, as in a manifest; any dtype, which a copy into fp32 converts.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Mapping[str, Any]]):
        self._folder, self._tensors = folder, tensors

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between loads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Describe the stored tensors in DCP's terms."""
        tensors, places = {}, {}
        for name, entry in self._tensors.items():
            chunks = []
            for piece in entry["pieces"]:
                chunks.append(ChunkStorageMetadata(torch.Size(piece["offset"]), torch.Size(piece["shape"])))
                places[MetadataIndex(name, torch.Size(piece["offset"]))] = (piece["file"], piece["key"])
            tensors[name] = TensorStorageMetadata(TensorProperties(dtype=DTYPE), torch.Size(entry["shape"]), chunks)
        return Metadata(cast(Any, tensors), storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Keep which file and key each piece has."""
        self._places = cast(dict[MetadataIndex, tuple[str, str]], metadata.storage_data)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill this rank's boxes, file by file."""
        by_file = defaultdict(list)
        for item in plan.items:
            file, key = self._places[item.storage_index]
            by_file[file].append((key, item))
        for name, items in by_file.items():
            with safe_open(self._folder / name, framework="pt") as file:
                for key, item in items:
                    ends = zip(item.storage_offsets, item.lengths, strict=True)
                    part = file.get_slice(key)[tuple(slice(at, at + length) for at, length in ends)]
                    planner.resolve_tensor(item).copy_(part)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any folder."""
        return True


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), box.values.shape)


def _values(pieces: dict[str, Piece], index: MetadataIndex) -> torch.Tensor:
    return next(box.values for box in pieces[index.fqn].boxes if box.offsets == tuple(index.offset or ()))


def _key(index: MetadataIndex) -> str:
    """Key a box in a file, as ``exp_avg/head.proj.weight[128,0]``: a rank may hold several boxes of a tensor."""
    return f"{index.fqn}[{','.join(map(str, index.offset or ()))}]"
