"""What stands in for compiled kernels and for flash attention on meta tensors: it holds what they hold, and no more."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from model.documents import Documents
from model.stand_ins import StandIns
from parallel.dry_run.record import Record
from parallel.dry_run.storages import Kind
from parallel.plan.operations import Attention, Traffic

_Spec = tuple[torch.Size, tuple[int, ...], torch.dtype]
_LOGITS = ("_row_sums", "_overwrite")
"""The formulas of `model.loss` whose first argument is the logits."""


def stand_ins_for(record: Record) -> StandIns:
    """Return what stands in for kernels in a dry run.

    Args:
        record: is told of every kernel, and of the tensors that it makes.
    """
    results: dict[Any, list[_Spec] | None] = {}

    def compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: _run(formula, arguments, results, record)

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents | None, window: int | None
    ) -> torch.Tensor:
        return _Flash.apply(q, k, v, documents, window, record)

    return StandIns(compiled, attention)


def _run(
    formula: Callable[..., Any], arguments: Sequence[Any], results: dict[Any, list[_Spec] | None], record: Record
) -> Any:
    """Make the results of a formula without what it makes on the way, as one kernel does.

    Args:
        formula: of `model.fused` or `model.loss`, which returns a fresh tensor, several, or None where it writes to
            its first argument.
        arguments: of the formula.
        results: the shapes, strides and dtypes of its results, by formula and arguments, as far as they are known.
        record: is told of the kernel.
    """
    inputs = [one for one in arguments if isinstance(one, torch.Tensor)]
    key = (
        formula,
        *((one.shape, one.stride(), one.dtype) if isinstance(one, torch.Tensor) else one for one in arguments),
    )
    with _disable_current_modes():
        if key not in results:
            with torch.no_grad():
                made = formula(*arguments)
            made = [made] if isinstance(made, torch.Tensor) else made
            results[key] = None if made is None else [_spec(one) for one in made]
        specs = results[key]
        outputs = [
            torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in specs or ()
        ]
    if formula.__name__ in _LOGITS:
        record.storages.label(inputs[:1], Kind.logits)
    written = outputs if specs is not None else inputs[:1]
    record.made(outputs)
    record.operation(Traffic(sum(one.nbytes for one in (*inputs, *written)), formula.__name__.strip("_")))
    return None if specs is None else outputs[0] if len(outputs) == 1 else tuple(outputs)


def _spec(tensor: torch.Tensor) -> _Spec:
    return tensor.shape, tensor.stride(), tensor.dtype


class _Flash(torch.autograd.Function):
    """Attention by a flash kernel, which saves its inputs, its output and the logarithms of the sums of exponentials.

    flash-attn 2 (arXiv 2307.08691) keeps the latter as fp32 (B, H, L), its varlen kernel as (H, B L): the same number.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        documents: Documents | None,
        window: int | None,
        record: Record,
    ) -> torch.Tensor:
        B, L, H, _ = q.shape
        out, sums = q.new_empty(q.shape), q.new_empty((B, H, L), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.documents, ctx.window, ctx.record = documents, window, record
        _note(q, k, documents, window, record, backward=False)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        _note(q, k, ctx.documents, ctx.window, ctx.record, backward=True)
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), None, None, None


def _note(
    q: torch.Tensor,
    k: torch.Tensor,
    documents: Documents | None,
    window: int | None,
    record: Record,
    backward: bool,
) -> None:
    (B, L, H, K), kv_heads = q.shape, k.shape[2]
    lengths = documents.lengths if documents else (L,) * B
    for length in sorted(set(lengths)):
        batch = lengths.count(length)
        record.operation(Attention(batch, length, H, kv_heads, K, backward, q.element_size(), window))
