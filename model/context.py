"""What a block knows about its input besides the activations.

B sequences, L tokens.
"""

from dataclasses import dataclass

import torch

from model.cache import KVCache
from model.rematerialization import Rematerialization


@dataclass(frozen=True)
class Context:
    """Documents, positions, cached keys and values, and what the backward pass may recompute.

    Attributes:
        documents_BL: int (B, L), which document of its sequence a position belongs to: attention sees earlier positions
            of the same document only. None: each sequence is one document.
        positions_BL: int64 (B, L), the position of each token in its document, for the rotary angles; below
            `max_seq_len`. None: 0 to L-1 in every sequence, or the positions after those that are cached.
        cache: keys and values of one block; the tokens come after those that it holds, and are added to it.
        rematerialization: the owner of what this forward pass offers to recompute in backward; None saves every
            tensor.
    """

    documents_BL: torch.Tensor | None = None
    positions_BL: torch.Tensor | None = None
    cache: KVCache | None = None
    rematerialization: Rematerialization | None = None


EMPTY_CONTEXT = Context()
"""Whole sequences of one document each, without a cache, every tensor saved."""
