"""RMSNorm, rotary positions, SwiGLU.

B batch, L sequence, M positions, D width, K head width, F inner width.
"""

from functools import lru_cache

import torch
from torch import nn

from model.config import Kernels
from model.fused import add_rms_norm, rms_norm, silu_mul
from model.rematerialization import Rematerialization


class RMSNorm(nn.Module):
    """x / rms(x) * weight, with the mean square taken in fp32 (arXiv 1910.07467)."""

    def __init__(self, d_model: int, eps: float, kernels: Kernels = Kernels.auto):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.eps, self.kernels = eps, kernels

    def forward(self, x_BLD: torch.Tensor, rematerialization: Rematerialization | None = None) -> torch.Tensor:
        """(B, L, D) to (B, L, D), same dtype."""
        return rms_norm(x_BLD, self.weight, self.eps, self.kernels, rematerialization)

    def of_sum(
        self, x_BLD: torch.Tensor, y_BLD: torch.Tensor, rematerialization: Rematerialization | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + y and its norm, in one pass over both."""
        return add_rms_norm(x_BLD, y_BLD, self.weight, self.eps, self.kernels, rematerialization)


class FusedLinears(nn.Module):
    """Several linear maps of one input, without biases.

    A fused product or a tensor-parallel cut reads the common input once; the matrices stay separate parameters under
    the names of the paper.

    Args:
        d_in: width of the input.
        widths: name and output width of each map, in order.
    """

    def __init__(self, d_in: int, **widths: int):
        super().__init__()
        for name, width in widths.items():
            self.add_module(name, nn.Linear(d_in, width, bias=False))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(..., d_in) to one (..., width) for each map."""
        return tuple(linear(x) for linear in self.children())


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int, kernels: Kernels = Kernels.auto):
        super().__init__()
        self.kernels = kernels
        self.gate_up = FusedLinears(d_model, gate_proj=d_ff, up_proj=d_ff)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x_BLD: torch.Tensor, rematerialization: Rematerialization | None = None) -> torch.Tensor:
        """(B, L, D) to (B, L, D)."""
        gate_BLF, up_BLF = self.gate_up(x_BLD)
        if rematerialization is not None:
            # Of a block's products these hold the most memory for the time that they take.
            rematerialization.offer([gate_BLF, up_BLF], self.gate_up, x_BLD, product=True)
        return self.down_proj(silu_mul(gate_BLF, up_BLF, self.kernels, rematerialization))


@lru_cache(maxsize=8)
def rotary_tables(
    num_positions: int, d_head: int, theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of position times frequency theta^(-2i/K) (arXiv 2104.09864), each fp32 (M, K/2).

    The angles are fp32 and computed on the CPU, as in the released Llama and DeepSeek implementations: at position
    4000 fp32 is off by 1e-4, and a checkpoint should see the same positions here and there, and on every device. The
    tables stay fp32 in a bf16 model: those implementations round them to bf16, which is one rounding more than
    `model.fused.rotary` makes. They are no module buffers, since a cast of the model to bf16 would round them.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, d_head, 2, dtype=torch.float32) / d_head)
    angles_MK = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return angles_MK.cos().to(device), angles_MK.sin().to(device)
