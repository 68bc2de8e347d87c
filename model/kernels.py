"""The attention backends. All take grouped queries as they are: keys and values are never repeated in memory.

Shapes: B batch, L sequence, H query heads, G key/value heads (H = G x group), K head width.
"""

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from model import fused
from model.config import AttentionBackend, ModelConfig

AttentionKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def causal_attention(
    q_BLHK: torch.Tensor, k_BLGK: torch.Tensor, v_BLGK: torch.Tensor, backend: AttentionBackend
) -> torch.Tensor:
    """Causal softmax attention, scaled by 1/sqrt(K), with each key/value head shared by H/G query heads.

    Args:
        q_BLHK: queries; k_BLGK, v_BLGK: keys and values, all of one dtype. Query head h reads key/value head
            h // (H/G).
        backend: `chosen` says what `auto` means.

    Returns:
        (B, L, H, K) in the dtype of the inputs; softmax statistics are fp32 inside.
    """
    return _kernel(backend, q_BLHK.device, q_BLHK.dtype)(q_BLHK, k_BLGK, v_BLGK)


@cache
def _kernel(backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    return KERNELS[chosen(backend, device, dtype)[0]]


def chosen(backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> tuple[AttentionBackend, str]:
    """What `auto` means for tensors on a device, and why, in a few words.

    Raises:
        RuntimeError: the backend that was asked for by name cannot run here; says why.
    """
    if backend is not AttentionBackend.auto:
        if reason := obstacle(backend, device, dtype):
            raise RuntimeError(f"model.attention={backend.name}: {reason}; model.attention=auto takes what there is")
        return backend, f"model.attention={backend.name}"
    if device.type != "cuda":
        return AttentionBackend.sdpa, f"the tensors are on the {device.type}"
    # Published forward passes on an H100, head width 128, causal, 4096: flash-attn 3 579 TFLOP/s, cuDNN's, which
    # PyTorch takes there, 518, flash-attn 2 319.
    hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    order = [AttentionBackend.flash3, AttentionBackend.flash4] if hopper else [AttentionBackend.flash2]
    reasons: list[str] = []
    for one in order:
        reason = obstacle(one, device, dtype)
        if not reason:
            return one, "the fastest that is installed" if not reasons else "; ".join(reasons)
        reasons.append(reason)
    return AttentionBackend.sdpa, "; ".join(reasons)


def which_and_why(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Which kernels a model runs on a device, those of `model/fused.py` among them, and why.

    Raises:
        RuntimeError: one that was asked for by name cannot.
    """
    attention, why = chosen(model.attention, device, dtype)
    between, reason = fused.chosen(model.kernels, device.type)
    return f"attention: {attention.name} ({why}); between matrices and in the loss: {between.name} ({reason})"


@cache
def obstacle(backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run on this device and dtype, or None if it has just done so, forward and backward."""
    if backend not in FLASH:
        return None
    title, module, least = FLASH[backend]
    if device.type != "cuda":
        return f"{title} runs on GPUs, and the tensors are on the {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{title} computes in 16 bits, and the tensors are {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < least:
        return f"{title} needs compute capability {least[0]}.{least[1]} or newer"
    try:
        if find_spec(module) is None:
            return f"{title} is not installed"
        q = torch.randn(1, 128, 2, 64, device=device, dtype=dtype, requires_grad=True)
        KERNELS[backend](q, q[:, :, :1], q[:, :, :1]).sum().backward()
    except Exception as error:  # whatever a build for another PyTorch or GPU does
        return f"{title} is installed and fails ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    return None


def flash2(q_BLHK: torch.Tensor, k_BLGK: torch.Tensor, v_BLGK: torch.Tensor) -> torch.Tensor:
    """flash-attn 2 (arXiv 2307.08691)."""
    from flash_attn import flash_attn_func

    return flash_attn_func(q_BLHK, k_BLGK, v_BLGK, causal=True)


def _flash_in_pytorch(name: str) -> AttentionKernel:
    """A newer flash-attn, which PyTorch calls in the place of its own once it has been told to."""

    def attention(q_BLHK: torch.Tensor, k_BLGK: torch.Tensor, v_BLGK: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        _activate(name)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # on Hopper PyTorch would take cuDNN's
            return sdpa(q_BLHK, k_BLGK, v_BLGK)

    return attention


def _activate(name: str) -> None:
    from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl

    if current_flash_attention_impl() != name:
        activate_flash_attention_impl(name)


def sdpa(q_BLHK: torch.Tensor, k_BLGK: torch.Tensor, v_BLGK: torch.Tensor) -> torch.Tensor:
    """PyTorch's scaled dot-product attention; on the CPU and on GPUs it runs a flash kernel of its own."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLGK, v_BLGK))
    out_BHLK = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out_BHLK.transpose(1, 2)


def cached_attention(
    q_B1HK: torch.Tensor, k_BGMK: torch.Tensor, v_BGMK: torch.Tensor, lengths_B: torch.Tensor
) -> torch.Tensor:
    """Attention of one token of each sequence to all that its key/value heads hold.

    The query heads of a group stand where a sequence would: each key and value is read once for all of them.

    Args:
        q_B1HK: the queries; k_BGMK, v_BGMK: keys and values, the token's own among them.
        lengths_B: int64, how many positions of each sequence count.

    Returns:
        (B, 1, H, K).
    """
    B, _, H, K = q_B1HK.shape
    G, M = k_BGMK.shape[1:3]
    q_BGRK = q_B1HK.view(B, G, H // G, K)
    seen_BM = torch.arange(M, device=lengths_B.device) < lengths_B.unsqueeze(1)
    mask_BGRM = seen_BM.view(B, 1, 1, M).expand(B, G, H // G, M)
    return F.scaled_dot_product_attention(q_BGRK, k_BGMK, v_BGMK, attn_mask=mask_BGRM).reshape(B, 1, H, K)


def reference(q_BLHK: torch.Tensor, k_BLGK: torch.Tensor, v_BLGK: torch.Tensor) -> torch.Tensor:
    """The definition, written out slowly; the other backends are tested against it."""
    B, L, H, K = q_BLHK.shape
    G = k_BLGK.shape[2]
    q_BLGRK = q_BLHK.unflatten(2, (G, H // G))  # R query heads read each of the G key/value heads
    scores_BGRLM = torch.einsum("blgrk,bmgk->bgrlm", q_BLGRK, k_BLGK).float() / math.sqrt(K)
    future_LM = torch.ones(L, L, dtype=torch.bool, device=q_BLHK.device).triu(1)
    weights_BGRLM = scores_BGRLM.masked_fill(future_LM, float("-inf")).softmax(-1).to(v_BLGK.dtype)
    return torch.einsum("bgrlm,bmgk->blgrk", weights_BGRLM, v_BLGK).reshape(B, L, H, K)


KERNELS: dict[AttentionBackend, AttentionKernel] = {
    AttentionBackend.flash4: _flash_in_pytorch("FA4"),
    AttentionBackend.flash3: _flash_in_pytorch("FA3"),  # arXiv 2407.08608
    AttentionBackend.flash2: flash2,
    AttentionBackend.sdpa: sdpa,
    AttentionBackend.reference: reference,
}
FLASH = {
    AttentionBackend.flash4: ("flash-attn 4", "flash_attn.cute", (9, 0)),
    AttentionBackend.flash3: ("flash-attn 3", "flash_attn_interface", (9, 0)),
    AttentionBackend.flash2: ("flash-attn 2", "flash_attn_2_cuda", (8, 0)),
}
"""Each flash-attn: how it is called, the module that shows that it is there, and the oldest GPU."""
