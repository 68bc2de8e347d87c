"""The formulas between the matrices of a block: norms, rotary positions, SwiGLU's product.

They compute little and read and write whole activations. Each is written as a formula and its gradient, which save as
little as possible for the backward pass, and runs in one of three ways:

    plain      PyTorch's operators one after another
    compiled   each formula by torch.compile, once for a shape and shared by all layers. Schedules, recomputation and
               tensor-parallel cuts do not matter to it, since matrices and messages lie outside.
    liger      Liger-Kernel's Triton kernels (the loss is compiled: Liger-Kernel's waits for the GPU in backward, and
               keeps fp32 logits where the vocabulary is cut)

Compiled for a GPU, a norm is one kernel forward, with the addition before it if there is one; SwiGLU's product is one
forward and one backward. Rotary positions are two, for queries and for keys. The backward pass of a norm is three: one
for the gradient of its input, and two for that of its weight, a sum over all tokens that is split and then completed.
`tests/model/test_lowered.py` holds these numbers for an H100.

None of these kernels adds atomically, so that a compiled kernel repeats its bits. But the configuration of a kernel
with a reduction, and with it the order of its sums, is chosen by timing when it is compiled, and may differ between
ranks and runs; where ``torch.use_deterministic_algorithms(True)`` is set before that, Inductor leaves out those that
differ in the order.

B batch, L sequence, M positions, D width, F inner width, H query heads, G key/value heads, K head width.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial, wraps
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from model.config import Kernels
from model.rematerialization import Rematerialization
from model.stand_ins import stand_ins

Formula = TypeVar("Formula", bound=Callable[..., Any])


_MAX_SHAPES = 64
"""Shapes, dtypes and devices for which one formula is compiled before Dynamo refuses the next; its default is 8."""


def compiled(formula: Formula) -> Formula:
    """A function of tensors as torch.compile makes it, without graph breaks, compiled anew for each shape.

    With symbolic shapes, which PyTorch would use from the second shape on, kernels can no longer be specialised to a
    width, and a change of width in one place would slow down another.
    """
    standing = stand_ins()
    return standing.compiled(formula) if standing else _compiled(formula)  # type: ignore[return-value]


@cache
def _compiled(formula: Formula) -> Formula:
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return torch.compile(formula, **options, recompile_limit=_MAX_SHAPES)  # type: ignore[call-overload]
    function = torch.compile(formula, **options)

    # Dynamo's settings belong to a thread, and autograd runs gradients on threads of its own.
    @wraps(formula)
    def run(*args: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=_MAX_SHAPES):
            return function(*args)

    return run  # type: ignore[return-value]


def chosen(kernels: Kernels, device_type: str) -> tuple[Kernels, str]:
    """What `auto` means on a device, and why, in a few words.

    Raises:
        RuntimeError: Liger-Kernel was asked for and is not installed.
    """
    if kernels is Kernels.liger and find_spec("liger_kernel") is None:
        raise RuntimeError("model.kernels=liger: Liger-Kernel is not installed (pip install 'deepnarrow[gpu]')")
    if kernels is not Kernels.auto:
        return kernels, f"model.kernels={kernels.name}"
    if device_type != "cuda":
        return Kernels.plain, "on the CPU a compilation takes longer than it saves in a short run"
    if find_spec("triton") is None:
        return Kernels.plain, "triton, which torch.compile needs on GPUs, is not installed"
    return Kernels.compiled, "on a GPU"


@cache
def _chosen(kernels: Kernels, device_type: str) -> Kernels:
    return chosen(kernels, device_type)[0]


def _way(kernels: Kernels, x: torch.Tensor) -> Kernels:
    """How formulas of this tensor run here; something stands in for compiled kernels and for Liger-Kernel's alike."""
    if stand_ins():
        return Kernels.plain if kernels is Kernels.plain else Kernels.compiled
    return _chosen(kernels, x.device.type)


def runs_compiled(kernels: Kernels, x: torch.Tensor) -> bool:
    """Whether the loss runs compiled: where it has a gradient, since shapes in training do not change."""
    return x.requires_grad and _way(kernels, x) is not Kernels.plain


def rms_norm(
    x_BLD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    kernels: Kernels,
    rematerialization: Rematerialization | None = None,
) -> torch.Tensor:
    """x / rms(x) * weight (arXiv 1910.07467), (B, L, D) to (B, L, D), with the mean square in fp32."""
    if not torch.is_grad_enabled():
        return F.rms_norm(x_BLD, weight_D.shape, weight_D, eps)
    way = _way(kernels, x_BLD)
    normed = _liger_norm(x_BLD, weight_D, eps) if way is Kernels.liger else _RMSNorm.apply(x_BLD, weight_D, eps, way)
    if rematerialization is not None:
        rematerialization.offer([normed], partial(_recomputed_norm, weight_D, eps, way), x_BLD, product=False)
    return normed


def add_rms_norm(
    x_BLD: torch.Tensor,
    y_BLD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    kernels: Kernels,
    rematerialization: Rematerialization | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + y, and its `rms_norm`: both (B, L, D)."""
    if not torch.is_grad_enabled():
        sum_BLD = x_BLD + y_BLD
        return sum_BLD, F.rms_norm(sum_BLD, weight_D.shape, weight_D, eps)
    way = _way(kernels, x_BLD)
    if way is Kernels.liger:
        from liger_kernel.ops import LigerFusedAddRMSNormFunction

        normed, total = LigerFusedAddRMSNormFunction.apply(y_BLD, x_BLD, weight_D, eps, 0.0, "llama", False)
    else:
        total, normed = _AddRMSNorm.apply(x_BLD, y_BLD, weight_D, eps, way)
    if rematerialization is not None:
        rematerialization.offer([normed], partial(_recomputed_norm, weight_D, eps, way), total, product=False)
    return total, normed


def rotary(
    q_BLHK: torch.Tensor,
    k_BLGK: torch.Tensor,
    cos_MK: torch.Tensor,
    sin_MK: torch.Tensor,
    kernels: Kernels,
    positions_BL: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate each pair (x[i], x[i + K/2]) of queries and keys by its angle: the layout of Llama's released checkpoints.

    The training kernels of attention expect rotated inputs, so this is a pass of its own, over queries and keys at
    once. Products and sums are fp32, and the result is rounded once.

    Args:
        q_BLHK, k_BLGK: queries and keys.
        cos_MK, sin_MK: fp32 (M, K/2), of `model.layers.rotary_tables`.
        kernels: how to run it.
        positions_BL: int64 (B, L), the row of the tables of each token; None for rows 0 to L-1.

    Returns:
        Queries and keys in their dtype.
    """
    if not torch.is_grad_enabled():
        return _rotated(q_BLHK, k_BLGK, cos_MK, sin_MK, positions_BL, False)
    way = _way(kernels, q_BLHK)
    if way is Kernels.liger:
        from liger_kernel.ops import LigerRopeFunction

        tables = (_rows(table, q_BLHK, positions_BL).squeeze(-2).contiguous() for table in (cos_MK, sin_MK))
        q, k = LigerRopeFunction.apply(
            q_BLHK.transpose(1, 2), k_BLGK.transpose(1, 2), *tables, None, 1, q_BLHK.shape[-1]
        )
        return q.transpose(1, 2), k.transpose(1, 2)
    return _Rotary.apply(q_BLHK, k_BLGK, cos_MK, sin_MK, positions_BL, way)


def silu_mul(
    gate_BLF: torch.Tensor,
    up_BLF: torch.Tensor,
    kernels: Kernels,
    rematerialization: Rematerialization | None = None,
) -> torch.Tensor:
    """silu(gate) * up (arXiv 2002.05202), (B, L, F)."""
    if not torch.is_grad_enabled():
        return _silu_mul(gate_BLF, up_BLF)
    way = _way(kernels, gate_BLF)
    if way is Kernels.liger:
        from liger_kernel.ops import LigerSiLUMulFunction

        product = LigerSiLUMulFunction.apply(gate_BLF, up_BLF)
    else:
        product = _SiLUMul.apply(gate_BLF, up_BLF, way)
    if rematerialization is not None:
        rematerialization.offer([product], partial(_recomputed_silu_mul, way), gate_BLF, up_BLF, product=False)
    return product


def _liger_norm(x_BLD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    from liger_kernel.ops import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x_BLD, weight_D, eps, 0.0, "llama", False)


def _recomputed_norm(weight_D: torch.Tensor, eps: float, way: Kernels, x_BLD: torch.Tensor) -> list[torch.Tensor]:
    if way is Kernels.liger:
        return [_liger_norm(x_BLD, weight_D, eps)]
    return [_run(_normed, way)(x_BLD, weight_D, eps)[0]]


def _recomputed_silu_mul(way: Kernels, gate_BLF: torch.Tensor, up_BLF: torch.Tensor) -> list[torch.Tensor]:
    return [_run(_silu_mul, way)(gate_BLF, up_BLF)]


# ---- formulas ----


def _run(formula: Formula, way: Kernels) -> Formula:
    return compiled(formula) if way is Kernels.compiled else formula


def _normed(x_BLD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    x = x_BLD.float()
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * rstd * weight_D.float()).to(x_BLD.dtype), rstd


def _normed_gradient(
    grad_BLD: torch.Tensor, x_BLD: torch.Tensor, weight_D: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    grad, unit = grad_BLD.float(), x_BLD.float() * rstd
    grad_weight = (grad * unit).flatten(0, -2).sum(0)
    grad = grad * weight_D.float()
    grad_x = (grad - unit * (grad * unit).mean(-1, keepdim=True)) * rstd
    return grad_x.to(x_BLD.dtype), grad_weight.to(weight_D.dtype)


def _add_normed(
    x_BLD: torch.Tensor, y_BLD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sum_BLD = x_BLD + y_BLD
    return sum_BLD, *_normed(sum_BLD, weight_D, eps)


def _add_normed_gradient(
    grad_sum: torch.Tensor, grad_BLD: torch.Tensor, sum_BLD: torch.Tensor, weight_D: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_x, grad_weight = _normed_gradient(grad_BLD, sum_BLD, weight_D, rstd)
    return grad_x + grad_sum, grad_weight


def _rows(table_MK: torch.Tensor, x_BLHK: torch.Tensor, positions_BL: torch.Tensor | None) -> torch.Tensor:
    """The table at each position of x, (1 or B, L, 1, K/2)."""
    if positions_BL is None:
        return table_MK.narrow(0, 0, x_BLHK.shape[1]).view(1, -1, 1, table_MK.shape[1])
    return F.embedding(positions_BL, table_MK).unsqueeze(2)


def _rotated(
    q_BLHK: torch.Tensor,
    k_BLGK: torch.Tensor,
    cos_MK: torch.Tensor,
    sin_MK: torch.Tensor,
    positions_BL: torch.Tensor | None,
    back: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = (_rows(table, q_BLHK, positions_BL) for table in (cos_MK, sin_MK))

    def rotated(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        if back:
            return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return rotated(q_BLHK), rotated(k_BLGK)


def _silu_mul(gate_BLF: torch.Tensor, up_BLF: torch.Tensor) -> torch.Tensor:
    return F.silu(gate_BLF) * up_BLF


def _silu_mul_gradient(
    grad_BLF: torch.Tensor, gate_BLF: torch.Tensor, up_BLF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_gate, grad_up = grad_BLF * up_BLF, F.silu(gate_BLF)
    # In place: run by operators, this allocates two tensors of this size instead of four.
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate_BLF, grad_input=grad_gate)
    return grad_gate, grad_up.mul_(grad_BLF)


# ---- formulas with their gradients ----


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, way: Kernels) -> torch.Tensor:
        normed, rstd = _run(_normed, way)(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.way = way
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return *_run(_normed_gradient, ctx.way)(grads[0], *ctx.saved_tensors), None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float, way: Kernels
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, normed, rstd = _run(_add_normed, way)(x, y, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.way = way
        return total, normed

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        grad_x, grad_weight = _run(_add_normed_gradient, ctx.way)(*grads, *ctx.saved_tensors)
        return grad_x, grad_x, grad_weight, None, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor | None,
        way: Kernels,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin, positions)
        ctx.way = way
        return _run(_rotated, way)(q, k, cos, sin, positions, False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        cos, sin, positions = ctx.saved_tensors
        # Back by the same angle.
        grad_q, grad_k = _run(_rotated, ctx.way)(grads[0], grads[1], cos, sin, positions, True)
        return grad_q, grad_k, None, None, None, None


class _SiLUMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, way: Kernels) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.way = way
        return _run(_silu_mul, way)(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return *_run(_silu_mul_gradient, ctx.way)(grads[0], *ctx.saved_tensors), None
