"""The record of a rank's step: its operators as the plan counts them, its messages, and the storages that it holds."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.dry_run.storages import Kind, Storages
from parallel.plan.operations import Operation, Product, Traffic
from parallel.schedules import Action

aten = torch.ops.aten

_FREE = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "_local_scalar_dense"}
"""Operators that read and write nothing."""


@dataclass(frozen=True)
class Call:
    """A call of a process group.

    Attributes:
        operation: all_reduce, all_gather, reduce_scatter, broadcast, barrier, send or receive.
        group: the group, as the process has it.
        num_bytes: of the whole tensor: what an all-gather ends with and a reduce-scatter begins with.
        dtype: of its values.
        how: SUM, MAX and the like of a reduction; else empty.
        peer: of a message, the rank in the group that it comes from or goes to; else -1.
        number: of this call in its step.
    """

    operation: str
    group: Any
    num_bytes: int
    dtype: str
    how: str
    peer: int
    number: int


@dataclass(frozen=True)
class Awaited:
    """The compute stream waits for a call.

    Attributes:
        step: the step that the call was in.
        number: of the call in its step.
    """

    step: int
    number: int


@dataclass
class Section:
    """What a rank does in a pass, or before or after all of them.

    Attributes:
        action: the pass; None before and after the passes.
        done: in order, what it computes and says.
    """

    action: Action | None
    done: list[Operation | Call | Awaited] = field(default_factory=list)


class Record:
    """The record of the step that a rank is in.

    Args:
        device_type: of the device that storages are followed on.
    """

    def __init__(self, device_type: str):
        self.storages = Storages(device_type)
        self.step = 0
        self.calls: list[Call] = []
        self.reads = 0
        """The values that the host has asked for."""
        self.sections: list[Section] = [Section(None)]
        self._between: list[Operation | Call | Awaited] | None = None

    def restart(self) -> None:
        """Begin a step."""
        self.step += 1
        self.calls, self.sections, self.reads = [], [Section(None)], 0
        self._between = None
        self.storages.restart()

    @contextmanager
    def around(self, action: Action) -> Iterator[None]:
        """Record a pass. What is done between two passes, such as asking for a message, is the later one's."""
        self.sections.append(Section(action, self._between or []))
        self._between = None
        self.storages.next_section()
        yield
        self.storages.mark()
        self._between = []

    def end(self) -> None:
        """Begin what comes after the last pass of the step."""
        self.sections.append(Section(None, self._between or []))
        self._between = None
        self.storages.next_section()

    def operation(self, one: Operation | Awaited) -> None:
        """Record an operation, or that a call is awaited."""
        (self.sections[-1].done if self._between is None else self._between).append(one)

    def call(self, operation: str, group: Any, tensor: torch.Tensor | None, how: str = "", peer: int = -1) -> Call:
        """Record a call of a process group."""
        num_bytes, dtype = (tensor.nbytes, str(tensor.dtype).removeprefix("torch.")) if tensor is not None else (0, "")
        call = Call(operation, group, num_bytes, dtype, how, peer, len(self.calls))
        self.calls.append(call)
        (self.sections[-1].done if self._between is None else self._between).append(call)
        return call

    def passes(self, tensors: Iterable[torch.Tensor]) -> None:
        """Note that tensors come from another rank or go to one."""
        self.storages.label(tensors, Kind.passing)

    def made(self, tensors: Iterable[torch.Tensor]) -> None:
        """Follow the storages of tensors."""
        for one in tensors:
            self.storages.see(one)


class Recorder(TorchDispatchMode):
    """Within, every operator on the record's device is recorded, and the storages of its results are followed.

    On the meta device a value that the host asks for is made up: it is 1.

    Args:
        record: where to.
    """

    def __init__(self, record: Record):
        super().__init__()
        self._record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (value := self._asked_for(func, args, kwargs)) is not None:
            self._record.reads += 1
            return value
        # Where nothing is computed, PyTorch's checks of what is written in place take most of the time.
        result = args[0] if _fits_in_place(func, args) and args[0].is_meta else func(*args, **kwargs)
        made = _tensors(result)
        fresh = [one for one in made if self._record.storages.see(one)]
        if not func.is_view and _name(func) not in _FREE:
            for operation in _operations(func, args, kwargs, fresh):
                self._record.operation(operation)
        return result

    @staticmethod
    def _asked_for(func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0 if args[0].is_floating_point() else 1
        if func is aten._to_copy.default and args[0].is_meta:
            device = torch.device(kwargs.get("device") or "meta")
            if device.type != "meta":
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=device)
        return None


def _fits_in_place(func: Any, args: Any) -> bool:
    """Return whether an operator writes to its first argument, and the others have the shapes for it."""
    if func is aten.addmm_.default:
        out, a, b = args[:3]
        return out.shape == (a.shape[0], b.shape[1]) and a.shape[1] == b.shape[0]
    if func is aten.add_.Tensor or func is aten.copy_.default:
        return isinstance(args[1], torch.Tensor) and args[0].shape == args[1].shape
    return False


def _operations(func: Any, args: Any, kwargs: Any, fresh: Sequence[torch.Tensor]) -> list[Operation]:
    name = _name(func)
    if name in ("mm", "bmm", "addmm", "addmm_"):
        a, b = args[1:3] if name.startswith("addmm") else args[:2]
        batch = a.shape[0] if name == "bmm" else 1
        product = Product(a.shape[-2], a.shape[-1], b.shape[-1], batch, a.element_size())
        total = kwargs.get("out")  # which it is added to (`parallel.deferral.add_product`)
        return [product] if total is None else [product, Traffic(2 * total.nbytes, "accumulated gradient")]
    inputs = [tensor for one in (*args, *kwargs.values()) for tensor in _tensors(one)]
    written = [
        tensor
        for index, key in _written(func)
        for tensor in _tensors(args[index] if index < len(args) else kwargs.get(key))
    ]
    return [Traffic(sum(one.nbytes for one in (*inputs, *written, *fresh)), name)]


@cache
def _name(func: Any) -> str:
    return func.overloadpacket.__name__


@cache
def _written(func: Any) -> list[tuple[int, str]]:
    """Return the index and name of the arguments that an operator writes to."""
    arguments = func._schema.arguments
    return [(i, one.name) for i, one in enumerate(arguments) if one.alias_info is not None and one.alias_info.is_write]


def _tensors(one: Any) -> Sequence[torch.Tensor]:
    if isinstance(one, torch.Tensor):
        return (one,)
    if isinstance(one, (list, tuple)):
        return [tensor for inner in one for tensor in _tensors(inner)]
    return ()
