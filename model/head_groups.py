"""Which key/value heads are alike, from second moments of what they hold, and groups of equal size of those that are.

G key/value heads, H query heads, K head width, P = K/2 rotary pairs, D width, N observations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from model.transformer import Block, Embedding
from model.weights import Weights, loaded_layers

_STARTS = 16
"""Groupings, besides that of neighbours, from which heads are swapped."""


@dataclass(frozen=True)
class HeadMoments:
    """Second moments of a block's heads, fp64; their scale is arbitrary.

    A head's rotary pair is one complex number x[i] + i x[i + K/2]: a position multiplies it by a phase, the same in all
    heads, so that the moments of rotated keys are those of keys before they are rotated.

    Attributes:
        keys_PGG: complex (P, G, G), of pair p the sum of k_g conj(k_h).
        values_GKGK: (G, K, G, K), the sum of v_g v_h^T.
        queries_PG: (P, G), the sum of |q|^2 over the queries that read key head g.
        outputs_GKK: (G, K, K), the sum of W^T W over the columns W of o_proj that value head g goes through.
    """

    keys_PGG: torch.Tensor
    values_GKGK: torch.Tensor
    queries_PG: torch.Tensor
    outputs_GKK: torch.Tensor

    @staticmethod
    def of(q_HKN: torch.Tensor, k_GKN: torch.Tensor, v_GKN: torch.Tensor, o_DHK: torch.Tensor) -> "HeadMoments":
        """Sum over N observations: the channels of the weights, as inputs without correlations make them, or tokens.

        Args:
            q_HKN, k_GKN, v_GKN: what each head's queries, keys and values are in every observation.
            o_DHK: the weights of o_proj.
        """
        num_kv_heads, d_head, _ = k_GKN.shape
        k_PGN = pairs(k_GKN).transpose(0, 1)
        v_FN = v_GKN.flatten(0, 1)
        queries_HP = pairs(q_HKN).abs().double().square().sum(-1)
        o_GMK = o_DHK.double().transpose(0, 1).reshape(num_kv_heads, -1, d_head)
        return HeadMoments(
            (k_PGN @ k_PGN.mH).to(torch.complex128),
            (v_FN @ v_FN.T).double().reshape(num_kv_heads, d_head, num_kv_heads, d_head),
            queries_HP.unflatten(0, (num_kv_heads, -1)).sum(1).T,
            o_GMK.mT @ o_GMK,
        )

    def __add__(self, other: "HeadMoments") -> "HeadMoments":
        """Add the observations of another, through the same o_proj."""
        return HeadMoments(
            self.keys_PGG + other.keys_PGG,
            self.values_GKGK + other.values_GKGK,
            self.queries_PG + other.queries_PG,
            self.outputs_GKK,
        )

    def similarity(self, aligned: bool) -> torch.Tensor:
        """Compare heads two by two: the cosine of their keys plus that of their values.

        Args:
            aligned: compare each two after the turns of the rotary pairs of one, and the orthogonal map of its values,
                that bring them closest (arXiv 2412.20677); a trace then becomes a nuclear norm.

        Returns:
            (G, G), symmetric, at most 2.
        """
        if not aligned:
            return _cosine(self.keys_PGG.real.sum(0)) + _cosine(torch.einsum("gkhk->gh", self.values_GKGK))
        num_heads = len(self.values_GKGK)
        nuclear_GG = torch.zeros(num_heads, num_heads, dtype=torch.float64)
        for head, moments_KGK in enumerate(self.values_GKGK):  # fp32 tells heads apart, in a fraction of the time
            cross_GKK = moments_KGK[:, head:].transpose(0, 1).float()
            nuclear_GG[head, head:] = nuclear_GG[head:, head] = torch.linalg.svdvals(cross_GKK).sum(-1).double()
        return _cosine(self.keys_PGG.abs().sum(0)) + _cosine(nuclear_GG)


def pairs(x: torch.Tensor) -> torch.Tensor:
    """Real (..., K, N) to the rotary pairs x[i] + i x[i + K/2], complex (..., P, N)."""
    return torch.complex(*x.chunk(2, dim=-2))


def unpaired(x: torch.Tensor) -> torch.Tensor:
    """Complex (..., P, N) to real (..., K, N), the inverse of `pairs`."""
    return torch.cat((x.real, x.imag), dim=-2)


def moments_of_weights(weights: Weights) -> Iterator[HeadMoments]:
    """Yield the moments of each block where its inputs are uncorrelated and of equal size: inner products of weights.

    Args:
        weights: of a model of any size; one block's attention is in memory at a time.
    """
    d_head = weights.config.d_head
    for index in range(weights.config.n_layers):
        where = f"blocks.{index}.attention"
        q, k, v = (
            weights.read(f"{where}.qkv.{name}_proj.weight").double().unflatten(0, (-1, d_head)) for name in "qkv"
        )
        yield HeadMoments.of(q, k, v, weights.read(f"{where}.o_proj.weight").unflatten(1, (-1, d_head)))


@torch.no_grad()
def moments_of_rows(weights: Weights, rows_BL: torch.Tensor) -> Iterator[HeadMoments]:
    """Yield the moments of each block over the tokens of calibration rows.

    Args:
        weights: of a model of any size; one layer is in memory at a time, and the activations of all rows.
        rows_BL: int64 (B, L), token ids on the CPU, each row a document.
    """
    d_head = weights.config.d_head
    rows = list(rows_BL.split(1))
    for _, layer in loaded_layers(weights):
        if isinstance(layer, Embedding):
            rows = [layer(row) for row in rows]
        elif isinstance(layer, Block):
            yield _moments_of_block(layer, rows, d_head)


def _moments_of_block(block: Block, rows: list[torch.Tensor], d_head: int) -> HeadMoments:
    """Run a block on the rows, which become its outputs, and sum the moments over all their tokens."""
    o_DHK = block.attention.o_proj.weight.unflatten(1, (-1, d_head))
    seen = list[tuple[torch.Tensor, ...]]()
    block.attention.qkv.register_forward_hook(lambda _module, _input, qkv: seen.append(qkv))
    total: HeadMoments | None = None
    for number, row in enumerate(rows):
        rows[number] = block(row)
        q, k, v = (x_BLF.flatten(0, 1).T.unflatten(0, (-1, d_head)) for x_BLF in seen.pop())
        moments = HeadMoments.of(q, k, v, o_DHK)
        total = moments if total is None else total + moments
    assert total is not None, "no calibration rows"
    return total


def equal_groups(similarity_GG: torch.Tensor, num_groups: int) -> tuple[tuple[int, ...], ...]:
    """Cut heads into groups of equal size so that the similarity within groups, summed over pairs, is large.

    From the grouping of neighbours, and from 16 others that are the same in every process, the two heads whose swap
    gains most change places until no swap gains; the best result is taken, what came of the neighbours where none is
    better. A swap costs O(G^2). The result is a local optimum; of up to 8 heads it is nearly always the best there is.

    Args:
        similarity_GG: (G, G), symmetric.
        num_groups: divides G.

    Returns:
        The heads of each group, ascending; groups by their first heads.
    """
    num_heads = len(similarity_GG)
    similarity = similarity_GG.double().clone().fill_diagonal_(0.0)
    generator = torch.Generator().manual_seed(0)
    starts = [torch.arange(num_heads)]
    starts += [torch.randperm(num_heads, generator=generator) for _ in range(_STARTS)]
    least = 1e-9 * float(similarity.abs().max())  # rounding is no gain, or heads would be swapped for ever
    best, best_score = torch.empty(0), -torch.inf
    for places in starts:
        group_of = places // (num_heads // num_groups)
        while True:
            member = torch.nn.functional.one_hot(group_of, num_groups).double()
            to_group = similarity @ member  # (head, group): what the head has in common with it
            to_others = to_group[:, group_of]  # (head, other head): with the other's group
            own = to_others.diagonal()
            gain = to_others + to_others.T - own[:, None] - own[None, :] - 2 * similarity
            gain[group_of[:, None] == group_of[None, :]] = 0.0
            if not gain.max() > least:
                break
            one, other = divmod(int(gain.argmax()), num_heads)
            group_of[[one, other]] = group_of[[other, one]]
        if (score := float(own.sum())) > best_score + least:
            best, best_score = group_of, score
    return tuple(sorted(_heads_of(best.tolist(), num_groups)))


def _heads_of(group_of: Sequence[int], num_groups: int) -> Iterator[tuple[int, ...]]:
    for group in range(num_groups):
        yield tuple(head for head, its in enumerate(group_of) if its == group)


def _cosine(products_GG: torch.Tensor) -> torch.Tensor:
    """Divide inner products by the norms; heads of nothing are like no other."""
    norms_G = products_GG.diagonal().clamp_min(torch.finfo(products_GG.dtype).tiny).sqrt()
    return products_GG / torch.outer(norms_G, norms_G)
