"""The attention backends. All take grouped queries as they are: keys and values are never repeated in memory.

From run to run on the same machine and libraries, `reference` and, on the CPU, `sdpa` repeat their bits. On GPUs the
backward passes of cuDNN and of flash-attn 2 to 4 do not: they add up the gradient of the queries in whatever order
their blocks finish. Where ``torch.use_deterministic_algorithms(True)`` is set, flash-attn 2 is asked for its
deterministic backward pass, PyTorch asks that of flash-attn 3 and 4 and of its own kernels, and `sdpa` leaves out
cuDNN, whose backward pass has no such mode. That is slower and takes more memory.

B batch, L sequence, H query heads, G key/value heads (H = G x R), K head width.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F

from model import fused
from model.config import AttentionBackend, ModelConfig
from model.documents import Documents, documents_of
from model.stand_ins import AttentionKernel, stand_ins
from model.varlen import by_document, flash_window, in_window, varlen, visible

_16_BITS = (torch.bfloat16, torch.float16)
SPLIT = 256
"""Keys of a split (`in_splits`), a divisor of the steps in which caches come into view on a GPU (`model.cache`)."""


def causal_attention(
    q_BLHK: torch.Tensor,
    k_BLGK: torch.Tensor,
    v_BLGK: torch.Tensor,
    backend: AttentionBackend,
    documents: Documents | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal softmax attention, scaled by 1/sqrt(K), with each key/value head shared by H/G query heads.

    Args:
        q_BLHK: queries; k_BLGK, v_BLGK: keys and values, all of one dtype. Query head h reads key/value head
            h // (H/G).
        backend: `chosen` says what `auto` means.
        documents: each position attends to earlier positions of the same document only; None where each sequence is one
            document. Their kernels compute what is seen and nothing else; where a GPU has none, and in `reference`,
            there is a mask of B L L bytes.
        window: each position attends to itself and so many less one before it; None to all before it. flash-attn's and
            PyTorch's varlen kernels compute what is seen and nothing else, and on a CPU little more is computed
            (`model.varlen.in_window`); where a GPU has none, and in `reference`, there is a mask.

    Returns:
        (B, L, H, K) in the dtype of the inputs; softmax statistics are fp32 inside.

    Raises:
        RuntimeError: a backend that was asked for by name cannot run here.
    """
    standing = stand_ins() if backend is not AttentionBackend.reference else None
    asked = (q_BLHK.device, q_BLHK.dtype, documents is not None, window is not None)
    kernel = standing.attention if standing else _kernel(backend, *asked)
    return kernel(q_BLHK, k_BLGK, v_BLGK, documents, window)


@cache
def _kernel(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, documents: bool, window: bool
) -> AttentionKernel:
    return KERNELS[chosen(backend, device, dtype, documents, window)[0]]


def chosen(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, documents: bool = False, window: bool = False
) -> tuple[AttentionBackend, str]:
    """What `auto` means for tensors on a device, and why, in a few words.

    Args:
        backend: the setting.
        device, dtype: of queries, keys and values.
        documents: whether attention stops at the borders of documents.
        window: whether it stops at those of a window.

    Raises:
        RuntimeError: the backend that was asked for by name cannot run here; the message says why.
    """
    if backend is not AttentionBackend.auto:
        if reason := obstacle(backend, device, dtype, documents, window):
            raise RuntimeError(f"model.attention={backend.name}: {reason}; model.attention=auto takes what there is")
        return backend, f"model.attention={backend.name}"
    if device.type != "cuda":
        return AttentionBackend.sdpa, f"the tensors are on the {device.type}"
    # Published forward passes on an H100, head width 128, causal, 4096: flash-attn 3 579 TFLOP/s, cuDNN's, which
    # PyTorch takes there, 518, flash-attn 2 319. With documents PyTorch takes its own build of flash-attn 2.
    hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    order = [AttentionBackend.flash3, AttentionBackend.flash4] if hopper else [AttentionBackend.flash2]
    if hopper and (documents or window) and _no_varlen(device, dtype, window):
        order.append(AttentionBackend.flash2)  # PyTorch would compute what a mask hides
    reasons: list[str] = []
    for one in order:
        reason = obstacle(one, device, dtype, documents, window)
        if not reason:
            return one, "the fastest that is installed" if not reasons else "; ".join(reasons)
        reasons.append(reason)
    return AttentionBackend.sdpa, "; ".join(reasons)


def which_and_why(model: ModelConfig, device: torch.device, dtype: torch.dtype, documents: bool = False) -> str:
    """The kernels that a model runs on a device, those of `model/fused.py` among them, and why these.

    Raises:
        RuntimeError: a kernel that was asked for by name cannot run here.
    """
    attention, why = chosen(model.attention, device, dtype, documents, model.window is not None)
    between, reason = fused.chosen(model.kernels, device.type)
    borders = f", documents {_how(attention, device, dtype, False)}" if documents else ""
    if model.window is not None:
        borders += f", a window of {model.window:,} tokens {_how(attention, device, dtype, True)}"
    full = chosen(model.attention, device, dtype, documents)[0] if None in model.windows else attention
    borders += f", {full.name} in full blocks" if full is not attention else ""
    return f"attention: {attention.name}{borders} ({why}); between matrices and in the loss: {between.name} ({reason})"


def _how(backend: AttentionBackend, device: torch.device, dtype: torch.dtype, window: bool) -> str:
    """How a backend stops at the borders of documents, or of a window, in a few words."""
    if backend in FLASH:
        return "by its own kernel" if window else "by its varlen kernel"
    if backend is AttentionBackend.reference:
        return "by a mask of all pairs"
    if device.type != "cuda":
        return "in pieces of a sequence" if window else "one after another"
    reason = _no_varlen(device, dtype, window)
    return f"by a mask of all pairs, since PyTorch's varlen kernel {reason}" if reason else "by PyTorch's varlen kernel"


@cache
def obstacle(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, documents: bool = False, window: bool = False
) -> str | None:
    """Why a backend cannot run on this device and dtype; None if it has just run there, forward and backward."""
    if backend not in FLASH:
        return None
    title, module, least = FLASH[backend]
    if device.type != "cuda":
        return f"{title} runs on GPUs, and the tensors are on the {device.type}"
    if dtype not in _16_BITS:
        return f"{title} computes in 16 bits, and the tensors are {str(dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(device) < least:
        return f"{title} needs compute capability {least[0]}.{least[1]} or newer"
    try:
        if find_spec(module) is None:
            return f"{title} is not installed"
        _run_once(KERNELS[backend], device, dtype, documents, window)
    except Exception as error:  # whatever a build for another PyTorch or GPU does
        return f"{title} is installed and fails ({_said(error)})"
    finally:
        _activate(None)  # a probe leaves nothing registered: `sdpa` would run it in the place of PyTorch's own
    return None


@cache
def _no_varlen(device: torch.device, dtype: torch.dtype, window: bool) -> str | None:
    """Why PyTorch's own varlen kernel cannot run on a GPU; None if it has just run there, forward and backward."""
    if dtype not in _16_BITS:
        return f"computes in 16 bits, and the tensors are {str(dtype).removeprefix('torch.')}"
    try:
        _run_once(lambda q, k, v, of, w: varlen(q, k, v, cast(Documents, of), w), device, dtype, True, window)
    except Exception as error:  # of a PyTorch without it, or of a GPU that it was not built for
        return f"fails ({_said(error)})"
    return None


def _run_once(kernel: AttentionKernel, device: torch.device, dtype: torch.dtype, documents: bool, window: bool) -> None:
    with torch.inference_mode(False), torch.enable_grad():  # it may be an evaluation that asks first
        q = torch.randn(1, 128, 2, 64, device=device, dtype=dtype, requires_grad=True)
        two = documents_of(torch.arange(128).unsqueeze(0) == 100).to(device) if documents else None
        kernel(q, q[:, :, :1], q[:, :, :1], two, 64 if window else None).sum().backward()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def flash2(
    q_BLHK: torch.Tensor,
    k_BLGK: torch.Tensor,
    v_BLGK: torch.Tensor,
    documents: Documents | None,
    window: int | None = None,
) -> torch.Tensor:
    """flash-attn 2 (arXiv 2307.08691); its backward pass is deterministic where PyTorch's algorithms must be."""
    how: dict[str, Any] = {
        "causal": True,
        "window_size": flash_window(window),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if documents is None:
        from flash_attn import flash_attn_func

        return flash_attn_func(q_BLHK, k_BLGK, v_BLGK, **how)
    from flash_attn import flash_attn_varlen_func

    q_THK, k_TGK, v_TGK = (x.flatten(0, 1) for x in (q_BLHK, k_BLGK, v_BLGK))
    borders, longest = documents.borders, documents.longest
    out_THK = flash_attn_varlen_func(q_THK, k_TGK, v_TGK, borders, borders, longest, longest, **how)
    return out_THK.view_as(q_BLHK)


def _flash_in_pytorch(name: str) -> AttentionKernel:
    """A newer flash-attn, which PyTorch calls in the place of its own once it has been told to."""

    def attention(
        q_BLHK: torch.Tensor,
        k_BLGK: torch.Tensor,
        v_BLGK: torch.Tensor,
        documents: Documents | None,
        window: int | None = None,
    ) -> torch.Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        _activate(name)
        if documents or window is not None:
            return varlen(q_BLHK, k_BLGK, v_BLGK, documents or _whole_sequences(q_BLHK), window)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # on Hopper PyTorch would take cuDNN's
            return _pytorchs(q_BLHK, k_BLGK, v_BLGK)

    return attention


def _activate(name: str | None) -> None:
    """Register a newer flash-attn with PyTorch; None restores PyTorch's own."""
    from torch.nn.attention import (
        activate_flash_attention_impl,
        current_flash_attention_impl,
        restore_flash_attention_impl,
    )

    if current_flash_attention_impl() == name:
        return
    with warnings.catch_warnings():
        # That a kernel takes the place of another is what is asked for.
        warnings.filterwarnings("ignore", r"Warning only once for all operators", UserWarning)
        if name is None:
            restore_flash_attention_impl()
        else:
            activate_flash_attention_impl(name)


def sdpa(
    q_BLHK: torch.Tensor,
    k_BLGK: torch.Tensor,
    v_BLGK: torch.Tensor,
    documents: Documents | None,
    window: int | None = None,
) -> torch.Tensor:
    """PyTorch's scaled dot-product attention; on a GPU it runs a flash kernel of its own, or cuDNN's."""
    if q_BLHK.is_cuda:
        _activate(None)  # a newer flash-attn may have run before
    if documents is None and window is None:
        return _pytorchs(q_BLHK, k_BLGK, v_BLGK)
    if not q_BLHK.is_cuda:
        if documents is None:
            return in_window(q_BLHK, k_BLGK, v_BLGK, window)
        return by_document(q_BLHK, k_BLGK, v_BLGK, documents, window)
    documents = documents or _whole_sequences(q_BLHK)
    if _no_varlen(q_BLHK.device, q_BLHK.dtype, window is not None):
        return sdpa_masked(q_BLHK, k_BLGK, v_BLGK, documents, window)
    return varlen(q_BLHK, k_BLGK, v_BLGK, documents, window)


def _whole_sequences(q_BLHK: torch.Tensor) -> Documents:
    """Each sequence as one document, for kernels that take windows where documents are."""
    return _documents_of_whole(q_BLHK.shape[0], q_BLHK.shape[1], q_BLHK.device)


@lru_cache(maxsize=8)
def _documents_of_whole(number: int, length: int, device: torch.device) -> Documents:
    with torch.inference_mode(False):  # a backward pass may save what an evaluation has asked for first
        return documents_of(torch.zeros(number, length, dtype=torch.bool)).to(device, non_blocking=False)


def sdpa_masked(
    q_BLHK: torch.Tensor, k_BLGK: torch.Tensor, v_BLGK: torch.Tensor, documents: Documents, window: int | None = None
) -> torch.Tensor:
    """`sdpa` by a mask of all pairs, which computes what is hidden as well: where there is no kernel for documents."""
    return _pytorchs(q_BLHK, k_BLGK, v_BLGK, visible(documents.positions_BL, window).unsqueeze(1))


def _pytorchs(
    q_BLHK: torch.Tensor, k_BLGK: torch.Tensor, v_BLGK: torch.Tensor, mask_B1LL: torch.Tensor | None = None
) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLGK, v_BLGK))
    causal, grouped = mask_B1LL is None, q.shape[1] != k.shape[1]
    with _without_cudnn() if q.is_cuda and torch.are_deterministic_algorithms_enabled() else nullcontext():
        out_BHLK = F.scaled_dot_product_attention(q, k, v, mask_B1LL, is_causal=causal, enable_gqa=grouped)
    return out_BHLK.transpose(1, 2)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """Within, `F.scaled_dot_product_attention` does not take cuDNN's kernel, whatever else it may take."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def cached_attention(
    q_B1HK: torch.Tensor, k_BGMK: torch.Tensor, v_BGMK: torch.Tensor, lengths_B: torch.Tensor
) -> torch.Tensor:
    """Attention of one new token of each sequence to the cached keys and values.

    The query heads of a group take the place of a sequence, so that each key and value is read once for all of them.

    Args:
        q_B1HK: the queries; k_BGMK, v_BGMK: keys and values, the new token's among them.
        lengths_B: int64, number of positions of each sequence that are attended to.

    Returns:
        (B, 1, H, K).
    """
    B, _, H, K = q_B1HK.shape
    G, M = k_BGMK.shape[1:3]
    q_BGRK = q_B1HK.view(B, G, H // G, K)
    seen_BM = torch.arange(M, device=lengths_B.device) < lengths_B.unsqueeze(1)
    if q_B1HK.is_cuda and M > SPLIT and M % SPLIT == 0 and _multiprocessors(q_B1HK.device) > B * G:
        return in_splits(q_BGRK, k_BGMK, v_BGMK, seen_BM).reshape(B, 1, H, K)
    mask_BGRM = seen_BM.view(B, 1, 1, M).expand(B, G, H // G, M)
    return F.scaled_dot_product_attention(q_BGRK, k_BGMK, v_BGMK, attn_mask=mask_BGRM).reshape(B, 1, H, K)


def in_splits(q_BGRK: torch.Tensor, k_BGMK: torch.Tensor, v_BGMK: torch.Tensor, seen_BM: torch.Tensor) -> torch.Tensor:
    """Attention to the positions that are seen, in splits of them, which a GPU reads at the same time, (B, G, R, K).

    PyTorch's kernels give a block of threads all keys of a sequence and head: with few of these most of a GPU is idle.
    """
    k_BGSNK, v_BGSNK = (x.unflatten(2, (-1, SPLIT)) for x in (k_BGMK, v_BGMK))
    scores_BGSRN = q_BGRK.unsqueeze(2) @ k_BGSNK.mT
    scores_BGRM = scores_BGSRN.transpose(2, 3).flatten(3).float() / math.sqrt(q_BGRK.shape[-1])
    weights_BGRM = scores_BGRM.masked_fill(~seen_BM[:, None, None], float("-inf")).softmax(-1).to(v_BGMK.dtype)
    return (weights_BGRM.unflatten(3, (-1, SPLIT)).transpose(2, 3) @ v_BGSNK).sum(2)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def reference(
    q_BLHK: torch.Tensor,
    k_BLGK: torch.Tensor,
    v_BLGK: torch.Tensor,
    documents: Documents | None,
    window: int | None = None,
) -> torch.Tensor:
    """The definition, written out slowly; the other backends are tested against it."""
    B, L, H, K = q_BLHK.shape
    G = k_BLGK.shape[2]
    q_BLGRK = q_BLHK.unflatten(2, (G, H // G))  # R query heads read each of the G key/value heads
    scores_BGRLM = torch.einsum("blgrk,bmgk->bgrlm", q_BLGRK, k_BLGK).float() / math.sqrt(K)
    whole_BL = torch.arange(L, device=q_BLHK.device).expand(B, L)
    seen_BLM = visible(documents.positions_BL if documents else whole_BL, window)
    hidden_B11LM = ~seen_BLM.unsqueeze(1).unsqueeze(1)
    weights_BGRLM = scores_BGRLM.masked_fill(hidden_B11LM, float("-inf")).softmax(-1).to(v_BLGK.dtype)
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
"""Title of each flash-attn, the module that is there if it is installed, and the least compute capability."""
