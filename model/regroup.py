"""Multi-head to grouped- or multi-query attention (arXiv 2305.13245, section 2.1): fewer key/value heads from more."""

from dataclasses import replace
from enum import Enum

import torch

from model.config import ModelConfig
from model.init import initial_value
from model.problems import either, nearest
from model.weights import Weights


class Method(Enum):
    """How the one key (value) head of a group is computed; the paper finds the first best and the last worst."""

    mean = "mean"
    """The mean of the group's heads."""
    first = "first"
    """The group's first head."""
    random = "random"
    """A new draw, as at the start of training."""


def regroup_heads(weight: torch.Tensor, d_head: int, n_kv_heads: int, method: Method) -> torch.Tensor:
    """The key or value projection of a layer with fewer heads.

    Query head h reads key/value head h // (H/G) before and after, so a new head stands for as many neighbouring old
    ones as there are fewer of them.

    Args:
        weight: (old heads x d_head, d_model), heads one after another.
        d_head: K.
        n_kv_heads: new heads; divides the old.
        method: mean, taken in fp32, or first.

    Returns:
        (new heads x d_head, d_model) in the dtype of `weight`; `weight` itself where there is nothing to do.
    """
    heads_GKD = weight.unflatten(0, (-1, d_head))
    if len(heads_GKD) == n_kv_heads:
        return weight
    groups_GRKD = heads_GKD.unflatten(0, (n_kv_heads, -1))  # R old heads to each of the G new
    if method is Method.mean:
        return groups_GRKD.float().mean(1).to(weight.dtype).flatten(0, 1)
    return groups_GRKD[:, 0].flatten(0, 1).contiguous()


class Regrouped:
    """A model's weights with fewer key/value heads, computed one tensor at a time.

    Args:
        source: the weights to regroup.
        n_kv_heads: key/value heads of the result.
        method: of making them.
        seed: for `Method.random`; each matrix is drawn from (seed, its full name).

    Raises:
        ValueError: with what would work: the heads cannot be grouped so.
    """

    def __init__(self, source: Weights, n_kv_heads: int, method: Method, seed: int = 1):
        if problem := problem_of(source.config, n_kv_heads):
            raise ValueError(problem)
        self.config = replace(source.config, n_kv_heads=n_kv_heads)
        self._source, self._method, self._seed = source, method, seed

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter by its full name."""
        weight = self._source.read(name)
        if not name.endswith(("k_proj.weight", "v_proj.weight")):
            return weight
        if self._method is Method.random and self.config.n_kv_heads != self._source.config.n_kv_heads:
            shape = torch.Size((self.config.n_kv_heads * self.config.d_head, self.config.d_model))
            return initial_value(name, shape, self._seed, self.config.init_std).to(weight.dtype)
        return regroup_heads(weight, self.config.d_head, self.config.n_kv_heads, self._method)


def problem_of(config: ModelConfig, n_kv_heads: int) -> str | None:
    """Why a model's key/value heads cannot become this many, in a sentence with what would work; None if they can."""
    old = config.n_kv_heads
    if n_kv_heads >= 1 and old % n_kv_heads == 0:
        return None
    works = nearest((n for n in range(1, old + 1) if old % n == 0), n_kv_heads)
    return (
        f"--kv-heads={n_kv_heads}: does not divide the {old} key/value heads of the model, and each new one stands for "
        f"equally many of them; {either('--kv-heads', works)} would work"
    )
