"""What lies between the matrices of a block, each as one kernel: norms, rotary positions, SwiGLU's product.

None of it computes much and all of it reads and writes whole activations, so each is written as a formula and its
gradient, which keep the least for backward that will do, and run in one of three ways:

    plain      PyTorch's operators one after another
    compiled   each formula as one kernel by torch.compile: compiled once for a shape, shared by all layers, and under
               any schedule, recomputation or cut, since the matrices and their messages lie outside
    liger      Liger-Kernel's Triton kernels (the loss compiled: theirs waits for the GPU in backward, and keeps fp32
               logits where the vocabulary is cut)

B batch, L sequence, D width, F inner width, H query heads, G key/value heads, K head width.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from model.config import Kernels
from model.rematerialization import remade

Formula = TypeVar("Formula", bound=Callable[..., Any])


@cache
def compiled(formula: Formula) -> Formula:
    """A function of tensors as one kernel, whole or not at all; compiled when it meets a shape."""
    return torch.compile(formula, fullgraph=True)  # type: ignore[return-value]


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


def runs_compiled(kernels: Kernels, x: torch.Tensor) -> bool:
    """Whether the loss runs compiled: in training, whose shapes do not change."""
    return x.requires_grad and _chosen(kernels, x.device.type) is not Kernels.plain


def rms_norm(x_BLD: torch.Tensor, weight_D: torch.Tensor, eps: float, kernels: Kernels) -> torch.Tensor:
    """x / rms(x) * weight (arXiv 1910.07467), (B, L, D) to (B, L, D), with the mean square in fp32."""
    if not torch.is_grad_enabled():
        return F.rms_norm(x_BLD, weight_D.shape, weight_D, eps)
    way = _chosen(kernels, x_BLD.device.type)
    normed = _liger_norm(x_BLD, weight_D, eps) if way is Kernels.liger else _RMSNorm.apply(x_BLD, weight_D, eps, way)
    remade([normed], partial(_norm_again, weight_D, eps, way), x_BLD, product=False)
    return normed


def add_rms_norm(
    x_BLD: torch.Tensor, y_BLD: torch.Tensor, weight_D: torch.Tensor, eps: float, kernels: Kernels
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + y, and its `rms_norm`: both (B, L, D)."""
    if not torch.is_grad_enabled():
        sum_BLD = x_BLD + y_BLD
        return sum_BLD, F.rms_norm(sum_BLD, weight_D.shape, weight_D, eps)
    way = _chosen(kernels, x_BLD.device.type)
    if way is Kernels.liger:
        from liger_kernel.ops import LigerFusedAddRMSNormFunction

        normed, total = LigerFusedAddRMSNormFunction.apply(y_BLD, x_BLD, weight_D, eps, 0.0, "llama", False)
    else:
        total, normed = _AddRMSNorm.apply(x_BLD, y_BLD, weight_D, eps, way)
    remade([normed], partial(_norm_again, weight_D, eps, way), total, product=False)
    return total, normed


def rotary(
    q_BLHK: torch.Tensor, k_BLGK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kernels: Kernels
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn each pair (x[i], x[i + K/2]) of queries and keys by its angle: the layout of Llama's released checkpoints.

    Training kernels of attention take none that is not turned yet, so this is a pass of its own, over both at once.

    Args:
        q_BLHK, k_BLGK: queries and keys.
        cos, sin: (L, 1, K/2), or (B, 1, 1, K/2), of `model.layers.rotary_tables`.
        kernels: how to run it.
    """
    if not torch.is_grad_enabled():
        return _turn(q_BLHK, k_BLGK, cos, sin)
    way = _chosen(kernels, q_BLHK.device.type)
    if way is Kernels.liger:
        from liger_kernel.ops import LigerRopeFunction

        tables = (table.squeeze(-2).unsqueeze(0) for table in (cos, sin))
        q, k = LigerRopeFunction.apply(
            q_BLHK.transpose(1, 2), k_BLGK.transpose(1, 2), *tables, None, 1, q_BLHK.shape[-1]
        )
        return q.transpose(1, 2), k.transpose(1, 2)
    return _Rotary.apply(q_BLHK, k_BLGK, cos, sin, way)


def silu_mul(gate_BLF: torch.Tensor, up_BLF: torch.Tensor, kernels: Kernels) -> torch.Tensor:
    """silu(gate) * up (arXiv 2002.05202), (B, L, F)."""
    if not torch.is_grad_enabled():
        return _silu_mul(gate_BLF, up_BLF)
    way = _chosen(kernels, gate_BLF.device.type)
    if way is Kernels.liger:
        from liger_kernel.ops import LigerSiLUMulFunction

        product = LigerSiLUMulFunction.apply(gate_BLF, up_BLF)
    else:
        product = _SiLUMul.apply(gate_BLF, up_BLF, way)
    remade([product], lambda gate, up: [_run(_silu_mul, way)(gate, up)], gate_BLF, up_BLF, product=False)
    return product


def _liger_norm(x_BLD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    from liger_kernel.ops import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x_BLD, weight_D, eps, 0.0, "llama", False)


def _norm_again(weight_D: torch.Tensor, eps: float, way: Kernels, x_BLD: torch.Tensor) -> list[torch.Tensor]:
    if way is Kernels.liger:
        return [_liger_norm(x_BLD, weight_D, eps)]
    return [_run(_normed, way)(x_BLD, weight_D, eps)[0]]


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


def _turn(
    q_BLHK: torch.Tensor, k_BLGK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    def turned(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    return turned(q_BLHK), turned(k_BLGK)


def _silu_mul(gate_BLF: torch.Tensor, up_BLF: torch.Tensor) -> torch.Tensor:
    return F.silu(gate_BLF) * up_BLF


def _silu_mul_gradient(
    grad_BLF: torch.Tensor, gate_BLF: torch.Tensor, up_BLF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    grad_gate, grad_up = grad_BLF * up_BLF, F.silu(gate_BLF)
    # In place: where no kernel fuses them, four tensors of this size would be made instead of two.
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
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, way: Kernels
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.way = way
        return _run(_turn, way)(q, k, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        grad_q, grad_k = _run(_turn, ctx.way)(grads[0], grads[1], cos, -sin)
        return grad_q, grad_k, None, None, None  # back by the same angle


class _SiLUMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, way: Kernels) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.way = way
        return _run(_silu_mul, way)(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return *_run(_silu_mul_gradient, ctx.way)(grads[0], *ctx.saved_tensors), None
