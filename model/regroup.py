"""Multi-head to grouped- or multi-query attention: fewer key/value heads from more.

The mean of neighbouring heads is the paper's (arXiv 2305.13245, section 2.1). Heads may also be grouped by what they
hold (`model.head_groups`), their queries moved along, and brought closer before they are merged (`model.head_merge`).
"""

from dataclasses import replace
from enum import Enum

import torch

from model.config import ModelConfig
from model.head_groups import equal_groups, moments_of_rows, moments_of_weights
from model.head_merge import (
    Merge,
    aligned_keys,
    aligned_values,
    mean_keys,
    mean_values,
    merge,
    svd_keys,
    svd_values,
)
from model.init import initial_value
from model.problems import either, nearest
from model.weights import Weights

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Method(Enum):
    """How heads are grouped, and how the one key (value) head of a group is computed.

    The first three group neighbours; the GQA paper finds the mean best and random last. The others group heads of equal
    number by similarity, block by block.
    """

    mean = "mean"
    """The mean of the group's heads."""
    first = "first"
    """The group's first head."""
    random = "random"
    """A new draw, as at the start of training."""
    similar = "similar"
    """The mean of heads that are alike."""
    aligned = "aligned"
    """The mean of heads that are alike after values are mapped orthogonally and rotary pairs of keys turned, which
    queries and outputs undo (arXiv 2412.20677)."""
    svd = "svd"
    """The best one head that queries and outputs can be made to read for such a group, by truncated singular value
    decomposition (arXiv 2406.07056)."""

    @property
    def by_similarity(self) -> bool:
        """Whether heads are grouped by what they hold, rather than neighbours."""
        return self in _MERGES


_MERGES = {
    Method.similar: (mean_keys, mean_values),
    Method.aligned: (aligned_keys, aligned_values),
    Method.svd: (svd_keys, svd_values),
}


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

    A method by similarity reads all attention weights beforehand, or runs the calibration rows through the model, and
    keeps a few numbers of each block.

    Args:
        source: the weights to regroup.
        n_kv_heads: key/value heads of the result.
        method: of making them.
        seed: for `Method.random`; each matrix is drawn from (seed, its full name).
        rows_BL: int64 (B, L), calibration rows for the methods by similarity, each a document: heads are compared by
            the keys and values of their tokens. None compares weights, as if all inputs of a block were alike in size
            and uncorrelated.

    Raises:
        ValueError: with what would work: the heads cannot be grouped so.
    """

    def __init__(
        self,
        source: Weights,
        n_kv_heads: int,
        method: Method,
        seed: int = 1,
        rows_BL: torch.Tensor | None = None,
    ):
        if problem := problem_of(source.config, n_kv_heads):
            raise ValueError(problem)
        self.config = replace(source.config, n_kv_heads=n_kv_heads)
        self._source, self._method, self._seed = source, method, seed
        self.merges: tuple[Merge, ...] = ()
        """Of each block, where heads are grouped by similarity: which those are, and what is lost."""
        if method.by_similarity and n_kv_heads != source.config.n_kv_heads:
            self.merges = _merges(source, n_kv_heads, method, rows_BL)

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter by its full name."""
        weight = self._source.read(name)
        matrix = name.removesuffix(".weight").rpartition(".")[2]
        if self.merges and matrix in _ATTENTION:
            return self.merges[int(name.split(".")[1])].apply(matrix, weight, self.config.d_head)
        if matrix not in ("k_proj", "v_proj") or self.config.n_kv_heads == self._source.config.n_kv_heads:
            return weight
        if self._method is Method.random:
            shape = torch.Size((self.config.n_kv_heads * self.config.d_head, self.config.d_model))
            return initial_value(name, shape, self._seed, self.config.init_std).to(weight.dtype)
        return regroup_heads(weight, self.config.d_head, self.config.n_kv_heads, self._method)


def _merges(source: Weights, n_kv_heads: int, method: Method, rows_BL: torch.Tensor | None) -> tuple[Merge, ...]:
    merged = []
    for moments in moments_of_weights(source) if rows_BL is None else moments_of_rows(source, rows_BL):
        alike = moments.similarity(aligned=method is not Method.similar)
        merged.append(merge(moments, equal_groups(alike, n_kv_heads), *_MERGES[method]))
    return tuple(merged)


def steps_of(old: int, new: int) -> tuple[int, ...]:
    """The numbers of key/value heads from one to another by the smallest steps: 8 to 1 are 4, 2, 1.

    A model is regrouped to each in turn, and trained in between.

    Args:
        old: heads of the model.
        new: heads to arrive at; divides `old`.

    Returns:
        Each number after the old, the new one last; empty where they are the same.
    """
    steps = []
    while old > new:
        old = next(old // factor for factor in range(2, old + 1) if not old % factor and not old // factor % new)
        steps.append(old)
    return tuple(steps)


def shares_of(total: int, parts: int) -> tuple[int, ...]:
    """A number of training steps over several trainings, as evenly as whole ones go and the longer ones last.

    Args:
        total: of all together.
        parts: how many; 23 over 3 are 7, 8, 8.
    """
    return tuple(total * (part + 1) // parts - total * part // parts for part in range(parts))


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
