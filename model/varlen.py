"""Attention that stops at the borders of documents, each computed as if it were alone, and at those of a window.

A window of W tokens lets a query see itself and the W - 1 tokens before it.

B batch, L sequence, H query heads, G key/value heads (H = G x R), K head width, N documents, T = B L tokens.
"""

import torch
import torch.nn.functional as F

from model.documents import Documents

_FEWEST_QUERIES = 128
"""Queries of a piece of a sequence at least, however short the window is: fewer are no faster, and more calls."""


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

    A sequence is cut into pieces no shorter than the window. The queries of each see keys of their own piece and of the
    one before, and a mask says which: for a token two pieces of keys are multiplied, where a mask of all pairs
    multiplies L.
    """
    grouped, length = q_BLHK.shape[2] != k_BLGK.shape[2], q_BLHK.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q_BLHK, k_BLGK, v_BLGK))
    if window is None or window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
    size = min(max(window, _FEWEST_QUERIES), length)
    places = torch.arange(2 * size, device=q.device)
    back = places[size:].unsqueeze(1) - places  # from the queries of a piece to the keys of the one before and its own
    seen = (back >= 0) & (back < window)
    outs = []
    before = [x[:, :, :0] for x in (k, v)]  # nothing is before the first piece
    for q_piece, *own in zip(*(x.split(size, dim=2) for x in (q, k, v)), strict=True):
        keys, values = (torch.cat(both, dim=2) for both in zip(before, own, strict=True))
        mask = seen[: q_piece.shape[2], size - before[0].shape[2] : size + q_piece.shape[2]]
        outs.append(F.scaled_dot_product_attention(q_piece, keys, values, mask, enable_gqa=grouped))
        before = own
    return torch.cat(outs, dim=2).transpose(1, 2)


def varlen(
    q_BLHK: torch.Tensor, k_BLGK: torch.Tensor, v_BLGK: torch.Tensor, documents: Documents, window: int | None = None
) -> torch.Tensor:
    """The varlen kernel of PyTorch, or of the flash-attn that is registered in its place, (B, L, H, K)."""
    from torch.nn.attention.varlen import varlen_attn

    q_THK, k_TGK, v_TGK = (x.flatten(0, 1) for x in (q_BLHK, k_BLGK, v_BLGK))
    borders, longest = documents.borders, documents.longest
    out_THK = varlen_attn(
        *(q_THK, k_TGK, v_TGK, borders, borders, longest, longest),
        window_size=flash_window(window),
        enable_gqa=q_THK.shape[1] != k_TGK.shape[1],
    )
    assert isinstance(out_THK, torch.Tensor)
    return out_THK.view_as(q_BLHK)


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
