"""Attention that stops at the borders of documents, each computed as if it were alone, and at those of a window.

A window of W tokens lets a query see itself and the W - 1 tokens before it.

B batch, L sequence, H query heads, G key/value heads (H = G x R), K head width, N documents, T = B L tokens.
"""

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F

from model.documents import Documents

_FEWEST_QUERIES = 128
"""Queries of a piece of a sequence at least, however short the window is: fewer are more calls of less each."""


def by_document(
    q_BLHK: torch.Tensor, k_BLGK: torch.Tensor, v_BLGK: torch.Tensor, documents: Documents, window: int | None = None
) -> torch.Tensor:
    """PyTorch's causal attention on one document after another, within a window if there is one, (B, L, H, K).

    On one core of a CPU, forward and backward, it takes a seventh of the time of a mask for all pairs, and a quarter of
    that of causal attention over whole sequences, at 2,048 tokens in documents of 170 and at 4,096 in documents of 500
    (``deepnarrow bench documents``). From 256 tokens on a mask is the slower, however short the documents are. Until
    the backward pass, its output is in memory twice, by document and whole.
    """
    parts = (x.flatten(0, 1).split(documents.lengths) for x in (q_BLHK, k_BLGK, v_BLGK))
    outs = [in_window(q[None], k[None], v[None], window)[0] for q, k, v in zip(*parts, strict=True)]
    return torch.cat(outs).view_as(q_BLHK)


def in_window(
    q_BLHK: torch.Tensor, k_BLGK: torch.Tensor, v_BLGK: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """PyTorch's causal attention within a window, (B, L, H, K); without one where that hides nothing.

    A sequence is cut into pieces, whose queries see keys of their own piece and of as many before it as the window
    reaches into; a mask says which. For a token 5/4 W keys are multiplied, or W + 128, where a mask of all pairs
    multiplies L. On one core of a CPU, forward and backward, 4,096 tokens of 8 heads on 2 take 1/7.4, 1/5.4, 1/3.4 and
    1/1.9 of the time of causal attention with windows of 128, 256, 512 and 1,024; with a mask of all pairs, 2.2 times.
    """
    grouped, length = q_BLHK.shape[2] != k_BLGK.shape[2], q_BLHK.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLGK, v_BLGK))
    if window is None or window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
    size = min(max(window // 4, _FEWEST_QUERIES), length)
    reach = -(-(window - 1) // size)  # pieces before a query's own
    places = torch.arange((reach + 1) * size, device=q.device)
    back = places[reach * size :].unsqueeze(1) - places
    seen = (back >= 0) & (back < window)
    pieces = [x.split(size, dim=2) for x in (q, k, v)]
    outs = []
    for at, own in enumerate(pieces[0]):
        first = max(0, at - reach)
        keys, values = (torch.cat(of[first : at + 1], dim=2) for of in pieces[1:])
        missing = (first - (at - reach)) * size  # before the first piece
        mask = seen[: own.shape[2], missing : missing + keys.shape[2]]
        outs.append(F.scaled_dot_product_attention(own, keys, values, mask, enable_gqa=grouped))
    return torch.cat(outs, dim=2).transpose(1, 2)


def varlen(
    q_BLHK: torch.Tensor, k_BLGK: torch.Tensor, v_BLGK: torch.Tensor, documents: Documents, window: int | None = None
) -> torch.Tensor:
    """The varlen kernel of PyTorch, or of the flash-attn that is registered in its place, (B, L, H, K)."""
    from torch.nn.attention.varlen import varlen_attn

    q_THK, k_TGK, v_TGK = (x.flatten(0, 1) for x in (q_BLHK, k_BLGK, v_BLGK))
    borders, longest = documents.borders, documents.longest
    how: dict[str, Any] = {"window_size": flash_window(window)}
    if _is_told_of_groups(varlen_attn):
        how["enable_gqa"] = q_THK.shape[1] != k_TGK.shape[1]
    out_THK = varlen_attn(q_THK, k_TGK, v_TGK, borders, borders, longest, longest, **how)
    assert isinstance(out_THK, torch.Tensor)
    return out_THK.view_as(q_BLHK)


@cache
def _is_told_of_groups(kernel: Callable[..., Any]) -> bool:
    """Whether the varlen kernel has to be told of grouped queries; PyTorch 2.11's takes them without."""
    return "enable_gqa" in signature(kernel).parameters


def flash_window(window: int | None) -> tuple[int, int]:
    """Tokens to the left and to the right of a query that it sees besides itself, as flash-attn takes them: causal."""
    return (-1 if window is None else window - 1, 0)


def visible(positions_BL: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Which positions (last dimension) each position attends to, bool (B, L, L).

    They are no further back than its document begins, and less than a window.
    """
    places = torch.arange(positions_BL.shape[1], device=positions_BL.device)
    back_LM = places.unsqueeze(1) - places
    seen_BLM = (back_LM >= 0) & (back_LM <= positions_BL.unsqueeze(2))
    return seen_BLM if window is None else seen_BLM & (back_LM < window)
