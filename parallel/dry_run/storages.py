"""The storages that a rank holds, followed from one operator to the next: their bytes, and of what kind they are."""

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch

_BLOCK = 512
"""Bytes that PyTorch's allocator for GPUs rounds every allocation up to."""


class Kind(Enum):
    """What a storage is for."""

    weights = "weights"
    """Weights in the precision that the stages compute in; in fp32 they are the master weights as well."""
    gradients = "gradients"
    """The fp32 gradients that the micro-batches of a step are summed in."""
    optimizer = "optimizer"
    """This replica's share of master weights and moments."""
    activations = "activations"
    """What a pass leaves behind for a later one, token ids among it."""
    workspace = "workspace"
    """What a pass makes and frees."""
    logits = "logits"
    """The logits, which their gradient overwrites."""
    passing = "passing"
    """Activations and gradients that come from another rank of the pipeline, or go to one."""


STATE = (Kind.weights, Kind.gradients, Kind.optimizer)
"""The kinds that a rank holds all the time."""


@dataclass(eq=False)
class _Storage:
    """A storage that has been seen.

    Attributes:
        num_bytes: of the allocator's block.
        born, died: the index of the section in which it came and went; `died` is None as long as it is there.
        kind: what it is for, where that has been said; None for activations and workspace, told apart by when it dies.
    """

    num_bytes: int
    born: int
    died: int | None = None
    kind: Kind | None = None

    @property
    def what(self) -> Kind:
        """The kind; known once the sections are over."""
        return self.kind or (Kind.workspace if self.born == self.died else Kind.activations)


@dataclass(frozen=True)
class Held:
    """The bytes of a rank in a section of its step.

    Attributes:
        peak: the most bytes that were allocated at any time of it.
        by_kind: those bytes by kind.
        after: the bytes that were allocated at its end.
    """

    peak: int
    by_kind: Mapping[Kind, int]
    after: int


class Storages:
    """The storages on a device that operators have made and not yet freed.

    Args:
        device_type: the type of the device; storages elsewhere are not followed.
    """

    def __init__(self, device_type: str):
        self._device_type = device_type
        self._known: dict[int, _Storage] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._trace: list[tuple[_Storage, bool]] = []
        self._section_begins: list[int] = []
        self._before: list[_Storage] = []
        self._marked = 0
        self.total = 0
        """The bytes that are allocated now."""
        self.peak = 0
        """The most bytes that were allocated at any time since the last `restart`."""

    def restart(self) -> None:
        """Forget what has been, but for what is there now, and begin the first section anew."""
        self._trace, self._section_begins = [], [0]
        self._before = list(self._known.values())
        for storage in self._before:
            storage.born = -1
        self.peak = self.total

    def next_section(self) -> None:
        """Begin another section, such as a pass."""
        self._section_begins.append(len(self._trace))

    def see(self, tensor: torch.Tensor) -> bool:
        """Follow the storage of a tensor from now on; return whether it is new."""
        if tensor.device.type != self._device_type:
            return False
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        if not (num_bytes := storage.nbytes()):
            return False
        num_bytes = -(-num_bytes // _BLOCK) * _BLOCK
        one = _Storage(num_bytes, len(self._section_begins) - 1)
        self._known[key] = one
        self._references[key] = weakref.ref(storage, lambda _, key=key: self._gone(key))  # type: ignore[misc]
        self._trace.append((one, True))
        self.total += num_bytes
        self.peak = max(self.peak, self.total)
        return True

    def label(self, tensors: Iterable[torch.Tensor], kind: Kind) -> None:
        """Say what storages are for, from their beginning on; those that have been labelled before stay what they are.

        Args:
            tensors: on this device.
            kind: what they are for.
        """
        for tensor in tensors:
            self.see(tensor)
            if (one := self._known.get(tensor.untyped_storage()._cdata)) and one.kind is None:
                one.kind = kind

    def sections(self) -> list[Held]:
        """Return what was held in each section since the last `restart`."""
        now: Counter[Kind] = Counter()
        for storage in self._before:
            now[storage.what] += storage.num_bytes
        total, found = sum(now.values()), []
        for begin, end in zip(self._section_begins, [*self._section_begins[1:], len(self._trace)], strict=True):
            peak, at_peak = total, dict(now)
            for storage, comes in self._trace[begin:end]:
                change = storage.num_bytes if comes else -storage.num_bytes
                now[storage.what] += change
                total += change
                if total > peak:
                    peak, at_peak = total, dict(now)
            found.append(Held(peak, {kind: at_peak.get(kind, 0) for kind in Kind}, total))
        return found

    def mark(self) -> None:
        """Remember this moment for `kept`, in the place of the one that was marked before."""
        self._marked = len(self._trace)

    def kept(self) -> int:
        """Return the bytes of activations that had come since the last `restart` and were there when it was marked."""
        there = set()
        for storage, comes in self._trace[: self._marked]:
            if comes:
                there.add(storage)
            else:
                there.discard(storage)
        return sum(storage.num_bytes for storage in there if storage.kind is None)

    def held(self) -> dict[Kind, int]:
        """Return the bytes that are held now, by kind."""
        now: Counter[Kind] = Counter()
        for storage in self._known.values():
            now[storage.what] += storage.num_bytes
        return {kind: now[kind] for kind in Kind}

    def _gone(self, key: int) -> None:
        one = self._known.pop(key)
        del self._references[key]
        one.died = len(self._section_begins) - 1
        self._trace.append((one, False))
        self.total -= one.num_bytes
