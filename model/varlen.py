"""Attention that stops at the borders of documents, each computed as if it were alone.

B batch, L sequence, H query heads, G key/value heads (H = G x R), K head width, N documents, T = B L tokens.
"""

import torch
import torch.nn.functional as F

from model.documents import Documents


def by_document(q_BLHK: torch.Tensor, k_BLGK: torch.Tensor, v_BLGK: torch.Tensor, documents: Documents) -> torch.Tensor:
    """PyTorch's causal attention on one document after another, (B, L, H, K).

    On one core of a CPU, forward and backward, it takes a seventh of the time of a mask for all pairs, and a quarter of
    that of causal attention over whole sequences, at 2,048 tokens in documents of 170 and at 4,096 in documents of 500
    (``deepnarrow bench documents``). From 256 tokens on a mask is the slower, however short the documents are. Until
    the backward pass, its output is in memory twice, by document and whole.
    """
    parts = (x.flatten(0, 1).split(documents.lengths) for x in (q_BLHK, k_BLGK, v_BLGK))
    grouped = q_BLHK.shape[2] != k_BLGK.shape[2]
    outs = []
    for document in zip(*parts, strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in document)
        outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)[0].transpose(0, 1))
    return torch.cat(outs).view_as(q_BLHK)


def varlen(q_BLHK: torch.Tensor, k_BLGK: torch.Tensor, v_BLGK: torch.Tensor, documents: Documents) -> torch.Tensor:
    """The varlen kernel of PyTorch, or of the flash-attn that is registered in its place, (B, L, H, K)."""
    from torch.nn.attention.varlen import varlen_attn

    q_THK, k_TGK, v_TGK = (x.flatten(0, 1) for x in (q_BLHK, k_BLGK, v_BLGK))
    borders, longest = documents.borders, documents.longest
    out_THK = varlen_attn(
        *(q_THK, k_TGK, v_TGK, borders, borders, longest, longest),
        window_size=(-1, 0),  # causal
        enable_gqa=q_THK.shape[1] != k_TGK.shape[1],
    )
    assert isinstance(out_THK, torch.Tensor)
    return out_THK.view_as(q_BLHK)


def visible(positions_BL: torch.Tensor) -> torch.Tensor:
    """Which positions (last dimension) each position attends to, bool (B, L, L): no further back than its document."""
    places = torch.arange(positions_BL.shape[1], device=positions_BL.device)
    back_LM = places.unsqueeze(1) - places
    return (back_LM >= 0) & (back_LM <= positions_BL.unsqueeze(2))
