"""What a block knows about its input besides the activations."""

from dataclasses import dataclass

from model.cache import KVCache
from model.documents import Documents
from model.rematerialization import Rematerialization


@dataclass(frozen=True)
class Context:
    """Documents, cached keys and values, and what the backward pass may recompute.

    Attributes:
        documents: attention sees earlier positions of the same document only, and the positions of the rotary angles
            are those in the document, below `max_seq_len`. None: each sequence is one document, with the positions 0 to
            L-1, or those after the tokens that are cached.
        cache: keys and values of one block; the tokens come after those that it holds, and are added to it.
        rematerialization: the owner of what this forward pass offers to recompute in backward; None saves every
            tensor.
    """

    documents: Documents | None = None
    cache: KVCache | None = None
    rematerialization: Rematerialization | None = None


EMPTY_CONTEXT = Context()
"""Whole sequences of one document each, without a cache, every tensor saved."""
