"""Grouped-query attention (arXiv 2305.13245).

    multi-head (G = H)       grouped-query            multi-query (G = 1)

    k  | | | | | | | |       k   |   |   |   |        k         |
       | | | | | | | |          / \\ / \\ / \\ / \\             /// \\\\\\
    q  | | | | | | | |       q | | | | | | | |        q  | | | | | | | |

The queries keep all their heads; G groups of them share one key head and one value head each.
B batch, L sequence, D width, H query heads, G key/value heads, K head width.
"""

import torch
from torch import nn

from model.config import ModelConfig
from model.context import EMPTY_CONTEXT, Context
from model.fused import rotary
from model.kernels import cached_attention, causal_attention
from model.layers import FusedLinears, rotary_tables


class GroupedQueryAttention(nn.Module):
    """Causal self-attention with rotary positions; `n_kv_heads` makes it multi-head, grouped- or multi-query.

    Args:
        config: the model's shape.
        window: tokens that a query sees, itself included (arXiv 1904.10509, 2004.05150); None for all before it.
    """

    def __init__(self, config: ModelConfig, window: int | None):
        super().__init__()
        d_model, self.d_head = config.d_model, config.d_head
        self.rope_theta, self.max_seq_len = config.rope_theta, config.max_seq_len
        self.backend, self.kernels, self.window = config.attention, config.kernels, window
        d_q, d_kv = config.n_heads * self.d_head, config.n_kv_heads * self.d_head
        self.qkv = FusedLinears(d_model, q_proj=d_q, k_proj=d_kv, v_proj=d_kv)
        self.o_proj = nn.Linear(config.n_heads * self.d_head, d_model, bias=False)

    def forward(self, x_BLD: torch.Tensor, context: Context = EMPTY_CONTEXT) -> torch.Tensor:
        """(B, L, D) to (B, L, D).

        With a cache, the tokens continue the sequences that it holds and are added to it: whole prompts where it is
        empty, and one token of each sequence afterwards.
        """
        # The number of heads is read off the projections: a tensor-parallel cut leaves each rank some of them.
        q_BLHK, k_BLGK, v_BLGK = (x.unflatten(-1, (-1, self.d_head)) for x in self.qkv(x_BLD))
        cache, documents = context.cache, context.documents
        past = cache if cache is not None and not cache.empty else None
        assert cache is None or documents is None, "a cached sequence is one document"
        positions_BL = documents.positions_BL if documents else past.lengths_B.unsqueeze(1) if past else None
        num_positions = max(self.max_seq_len, past.room if past else q_BLHK.shape[1])
        tables = rotary_tables(num_positions, self.d_head, self.rope_theta, q_BLHK.device)
        q_BLHK, k_BLGK = rotary(q_BLHK, k_BLGK, *tables, self.kernels, positions_BL)
        if cache is not None:
            cache.add(k_BLGK, v_BLGK)
        if past:
            out_BLHK = cached_attention(q_BLHK, *past.held())
        else:
            out_BLHK = causal_attention(q_BLHK, k_BLGK, v_BLGK, self.backend, documents, self.window)
        return self.o_proj(out_BLHK.flatten(2))
