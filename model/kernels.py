"""The attention backends. All take grouped queries as they are: keys and values are never repeated in memory.

Shapes: B batch, L sequence, H query heads, G key/value heads (H = G x group), K head width.
"""

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from model.config import AttentionBackend

AttentionKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def causal_attention(
    q_BLHK: torch.Tensor, k_BLGK: torch.Tensor, v_BLGK: torch.Tensor, backend: AttentionBackend
) -> torch.Tensor:
    """Causal softmax attention, scaled by 1/sqrt(K), with each key/value head shared by H/G query heads.

    Args:
        q_BLHK: queries; k_BLGK, v_BLGK: keys and values, all of one dtype. Query head h reads key/value head
            h // (H/G).
        backend: `auto` takes flash-attn where it is installed and can run (GPU, 16-bit), else PyTorch's own.

    Returns:
        (B, L, H, K) in the dtype of the inputs; softmax statistics are fp32 inside.
    """
    return _kernel(backend, q_BLHK.device.type, q_BLHK.dtype)(q_BLHK, k_BLGK, v_BLGK)


@cache
def _kernel(backend: AttentionBackend, device_type: str, dtype: torch.dtype) -> AttentionKernel:
    obstacle = flash_obstacle(device_type, dtype)
    if backend is AttentionBackend.reference:
        return reference
    if backend is AttentionBackend.flash and obstacle:
        raise RuntimeError(f"model.attention=flash: {obstacle}; model.attention=auto takes what there is")
    if backend is AttentionBackend.sdpa or obstacle:
        return sdpa
    return flash


def flash_obstacle(device_type: str, dtype: torch.dtype) -> str | None:
    """Why flash-attn cannot run on this device and dtype, or None if it can."""
    if device_type != "cuda":
        return "flash-attn runs on GPUs, and the tensors are on " + device_type
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn computes in 16 bits, and the tensors are {str(dtype).removeprefix('torch.')}"
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install 'deepnarrow[gpu]')"
    return None


def flash(q_BLHK: torch.Tensor, k_BLGK: torch.Tensor, v_BLGK: torch.Tensor) -> torch.Tensor:
    """flash-attn's kernel (arXiv 2307.08691), which takes fewer key/value heads than query heads natively."""
    from flash_attn import flash_attn_func

    return flash_attn_func(q_BLHK, k_BLGK, v_BLGK, causal=True)


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
