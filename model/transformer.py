"""The model: an embedding, blocks, a head. A pipeline cuts this list of layers into stages.

B batch, L sequence, D width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from model.attention import GroupedQueryAttention
from model.config import ModelConfig
from model.context import EMPTY_CONTEXT, Context
from model.layers import RMSNorm, SwiGLU


class Embedding(nn.Module):
    """Token ids to vectors."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """int64 (B, L) to (B, L, D)."""
        return self.tokens(tokens_BL)


class Block(nn.Module):
    """Attention, then the feed-forward network, each behind a norm and added to the residual stream.

    Args:
        config: the model's shape.
        window: the block's own of `ModelConfig.windows`.
    """

    def __init__(self, config: ModelConfig, window: int | None):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps, config.kernels)
        self.attention = GroupedQueryAttention(config, window)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps, config.kernels)
        self.ffn = SwiGLU(config.d_model, config.d_ff, config.kernels)

    def forward(self, x_BLD: torch.Tensor, context: Context = EMPTY_CONTEXT) -> torch.Tensor:
        """(B, L, D) to (B, L, D)."""
        rematerialization = context.rematerialization
        attended_BLD = self.attention(self.attention_norm(x_BLD, rematerialization), context)
        h_BLD, normed_BLD = self.ffn_norm.of_sum(x_BLD, attended_BLD, rematerialization)
        return h_BLD + self.ffn(normed_BLD, rematerialization)


class Head(nn.Module):
    """The last norm and the projection to the vocabulary (not tied to the embedding)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps, config.kernels)
        self.proj = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, x_BLD: torch.Tensor, project: bool = True) -> torch.Tensor:
        """(B, L, D) to logits (B, L, V), or to the norm's output (B, L, D), which `model.loss.head_loss` projects."""
        normed_BLD = self.norm(x_BLD)
        return self.proj(normed_BLD) if project else normed_BLD


def layer_builders(config: ModelConfig) -> dict[str, Callable[[], nn.Module]]:
    """A function for each layer, by name and in order, that builds it: a stage builds its own layers and no others.

    A parameter's full name, the same in every layout, is the layer's name, a dot, and its name inside the layer:
    ``blocks.17.attention.qkv.k_proj.weight``.
    """
    blocks = {f"blocks.{i}": partial(Block, config, window) for i, window in enumerate(config.windows)}
    return {"embedding": lambda: Embedding(config), **blocks, "head": lambda: Head(config)}


class Transformer(nn.Module):
    """The whole model in one process.

    Weights are allocated but not initialised (see `model/init.py`); under ``torch.device("meta")`` they take no memory.

    Raises:
        ValueError: the shape is impossible; the message says why.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if problems := config.problems():
            raise ValueError("\n".join(problems))
        self.config = config
        self.embedding = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, window) for window in config.windows)
        self.head = Head(config)

    def forward(self, tokens_BL: torch.Tensor, context: Context = EMPTY_CONTEXT) -> torch.Tensor:
        """int64 (B, L) to logits (B, L, V). Every block gets the context, without a cache: each needs its own."""
        assert context.cache is None, "a cache belongs to one block: model.generate.Decoder runs a model with caches"
        x_BLD = self.embedding(tokens_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD, context)
        return self.head(x_BLD)


def full_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The shape of every parameter of the whole model by its full name, in the order of its layers."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}
