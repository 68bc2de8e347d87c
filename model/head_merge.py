"""One key/value head in the place of several: what it is made of, and what queries and outputs turn to read it.

A model computes the same where the values of a head are mapped by any invertible matrix and the columns of o_proj that
read them by its inverse, and where a rotary pair of its keys, as one complex number, is multiplied by a factor and that
of its queries divided by the conjugate one: that commutes with the rotation by position (arXiv 2104.09864). Heads that
differ by no more than that hold the same, and become one head without loss.

G old key/value heads, N new ones, R = G/N of them in a group, H query heads, K head width, P = K/2 rotary pairs, D
width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model.head_groups import HeadMoments, pairs, unpaired

_ROUNDS = 5
"""Times that each head of a group is brought nearer to the others; each time they come closer."""
_TINY = torch.finfo(torch.float64).tiny


class Keys(NamedTuple):
    """How the keys of a group become one.

    Attributes:
        made_RP: complex, the new pair is the sum of made[r, p] k[r, p].
        read_RP: complex, k[r, p] is about read[r, p] times the new pair.
    """

    made_RP: torch.Tensor
    read_RP: torch.Tensor


class Values(NamedTuple):
    """How the values of a group become one.

    Attributes:
        made_RKK: the new value is the sum of made[r] v[r].
        read_RKK: v[r] is about read[r] times the new value.
    """

    made_RKK: torch.Tensor
    read_RKK: torch.Tensor


@dataclass(frozen=True)
class Merge:
    """The merge of all heads of a block.

    Attributes:
        groups: the old heads that each new one stands for.
        keys, values: of each group.
        lost_keys, lost_values: shares of the keys' and of the values' second moment that the merge drops.
    """

    groups: tuple[tuple[int, ...], ...]
    keys: tuple[Keys, ...]
    values: tuple[Values, ...]
    lost_keys: float
    lost_values: float

    def apply(self, name: str, weight: torch.Tensor, d_head: int) -> torch.Tensor:
        """One of the block's four attention matrices after the merge.

        Args:
            name: q_proj, k_proj, v_proj or o_proj.
            weight: q (H x K, D), k and v (G x K, D), o (D, H x K).
            d_head: K.

        Returns:
            The same shape for q and o, whose heads stand group after group, and (N x K, D) for k and v; in the dtype of
            `weight`, computed in fp32.
        """
        return self._computed(name, weight.float(), d_head).to(weight.dtype)

    def _computed(self, name: str, weight: torch.Tensor, d_head: int) -> torch.Tensor:
        order = torch.tensor(self.groups).flatten()
        if name == "k_proj":
            k_NRPD = pairs(weight.unflatten(0, (-1, d_head)))[order].unflatten(0, (len(self.groups), -1))
            made_NRP = torch.stack([keys.made_RP for keys in self.keys]).to(k_NRPD.dtype)
            return unpaired(torch.einsum("nrp,nrpd->npd", made_NRP, k_NRPD)).flatten(0, 1)
        if name == "v_proj":
            v_NRKD = weight.unflatten(0, (-1, d_head))[order].unflatten(0, (len(self.groups), -1))
            return torch.einsum("nrjk,nrkd->njd", self._stacked("made_RKK"), v_NRKD).flatten(0, 1)
        if name == "q_proj":
            q_GSPD = pairs(weight.unflatten(0, (self.num_heads, -1, d_head)))[order]  # S queries read each head
            factors_GP = torch.cat([keys.read_RP for keys in self.keys]).conj().to(q_GSPD.dtype)
            return unpaired(factors_GP[:, None, :, None] * q_GSPD).flatten(0, 2)
        assert name == "o_proj", name
        o_DGSK = weight.unflatten(1, (self.num_heads, -1, d_head))[:, order]
        return torch.einsum("dgsk,gkj->dgsj", o_DGSK, self._stacked("read_RKK").flatten(0, 1)).flatten(1)

    @property
    def num_heads(self) -> int:
        """The number of old key/value heads."""
        return sum(map(len, self.groups))

    def _stacked(self, which: str) -> torch.Tensor:
        return torch.stack([getattr(values, which) for values in self.values]).float()


def merge(
    moments: HeadMoments,
    groups: tuple[tuple[int, ...], ...],
    keys_of: Callable[[torch.Tensor, torch.Tensor], Keys],
    values_of: Callable[[torch.Tensor, torch.Tensor], Values],
) -> Merge:
    """Merge the heads of a block.

    Args:
        moments: of its heads.
        groups: of equal size.
        keys_of, values_of: of a group, from its moments, (P, R, R) and (R, K, R, K), and from the weights of an error:
            the queries' second moments (P, R), and the outputs' (R, K, K).
    """
    keys, values, lost = list[Keys](), list[Values](), torch.zeros(2, dtype=torch.float64)
    for group in groups:
        keys_PRR = moments.keys_PGG[:, group][:, :, group]
        values_RKRK = moments.values_GKGK[group, :][:, :, group]
        keys.append(keys_of(keys_PRR, moments.queries_PG[:, group]))
        values.append(values_of(values_RKRK, moments.outputs_GKK[group, :]))
        lost += torch.stack([_lost_keys(keys_PRR, keys[-1]), _lost_values(values_RKRK, values[-1])])
    whole_keys = moments.keys_PGG.diagonal(dim1=1, dim2=2).real.sum()
    whole = torch.stack([whole_keys, torch.einsum("gkgk->", moments.values_GKGK)]).clamp_min(_TINY)
    return Merge(groups, tuple(keys), tuple(values), *(lost / whole).clamp_min(0.0).tolist())


def mean_keys(keys_PRR: torch.Tensor, _: torch.Tensor) -> Keys:
    """The mean of the keys as they are (arXiv 2305.13245, section 2.1)."""
    one_RP = torch.ones_like(keys_PRR[:, 0].T)
    return Keys(one_RP / len(one_RP), one_RP)


def mean_values(values_RKRK: torch.Tensor, _: torch.Tensor) -> Values:
    """The mean of the values as they are."""
    num_heads, d_head = values_RKRK.shape[:2]
    one_RKK = torch.eye(d_head, dtype=torch.float64).expand(num_heads, -1, -1)
    return Values(one_RKK / num_heads, one_RKK)


def aligned_keys(keys_PRR: torch.Tensor, _: torch.Tensor) -> Keys:
    """The mean of the keys after each rotary pair has been turned to that of the others (arXiv 2412.20677)."""
    others_PRR = keys_PRR - torch.diag_embed(keys_PRR.diagonal(dim1=1, dim2=2))
    turn_PR = torch.sgn(keys_PRR[:, :, 0])  # to the first head: of two heads, that is all there is to do
    for _round in range(_ROUNDS if turn_PR.shape[1] > 2 else 0):
        for head in range(turn_PR.shape[1]):
            turn_PR[:, head] = torch.sgn((others_PRR[:, head] * turn_PR).sum(1))
    turn_RP = torch.where(turn_PR == 0, torch.ones_like(turn_PR), turn_PR).T
    return Keys(turn_RP.conj() / len(turn_RP), turn_RP)


def aligned_values(values_RKRK: torch.Tensor, _: torch.Tensor) -> Values:
    """The mean of the values after an orthogonal map of each head to the mean of the others, generalised Procrustes.

    Gower (Psychometrika 40, 1975); for heads arXiv 2412.20677.
    """
    num_heads = len(values_RKRK)
    map_RKK = _orthogonal(values_RKRK[:, :, 0])
    for _round in range(_ROUNDS if num_heads > 2 else 0):
        for head in range(num_heads):
            others_RKK = values_RKRK[head].transpose(0, 1) @ map_RKK
            map_RKK[head] = _orthogonal(others_RKK.sum(0) - others_RKK[head])
    return Values(map_RKK.mT / num_heads, map_RKK)


def svd_keys(keys_PRR: torch.Tensor, queries_PR: torch.Tensor) -> Keys:
    """The keys of least squared error of the scores: of each rotary pair the first singular vector over the heads.

    A head's pairs are weighted with the size of the queries that meet them. Positions turn a pair as a whole, so that
    one complex number remains to be chosen for each head, and the best is a singular vector. (arXiv 2406.07056 merges
    heads by singular values too, with strategies of its own for keys that are rotated.)
    """
    weight_PR = queries_PR.sqrt()
    weighted_PRR = weight_PR[:, :, None] * keys_PRR * weight_PR[:, None, :]
    made_PR = torch.linalg.eigh(weighted_PRR).eigenvectors[:, :, -1].conj() * weight_PR
    with_new_PR = (keys_PRR @ made_PR.conj()[:, :, None])[:, :, 0]  # of each head with the new one
    new_P = (made_PR * with_new_PR).sum(1).real.clamp_min(_TINY)
    read_PR = with_new_PR / new_P[:, None]
    # As large as the old keys are, since weight decay and Adam's steps go by size.
    size_P = read_PR.abs().square().mean(1).sqrt().clamp_min(_TINY)
    return Keys((made_PR * size_P[:, None]).T, (read_PR / size_P[:, None]).T)


def svd_values(values_RKRK: torch.Tensor, outputs_RKK: torch.Tensor) -> Values:
    """The values of least squared error of what o_proj makes of them: the first K singular vectors over all heads.

    It is the truncated singular value decomposition of the heads' products of o_proj and v_proj, one above the other
    (arXiv 2406.07056); o_proj takes up what is left for each head to choose.
    """
    num_heads, d_head = values_RKRK.shape[:2]
    size, vectors_RKK = torch.linalg.eigh(outputs_RKK)
    weight_RKK = (vectors_RKK * size.clamp_min(0.0).sqrt()[:, None, :]) @ vectors_RKK.mT
    weighted = torch.einsum("ajk,akbl,bml->ajbm", weight_RKK, values_RKRK, weight_RKK).flatten(2).flatten(0, 1)
    first = torch.linalg.eigh(weighted).eigenvectors[:, -d_head:].unflatten(0, (num_heads, d_head))
    made_RKK = first.mT @ weight_RKK
    with_new_RKK = torch.einsum("ajbk,blk->ajl", values_RKRK, made_RKK)  # of each head with the new one
    new_KK = torch.einsum("rjk,rkl->jl", made_RKK, with_new_RKK)
    read_RKK = with_new_RKK @ torch.linalg.pinv(new_KK, hermitian=True)
    # Of all bases of the new values, the one in which they are as large as the old: what reads them is orthonormal.
    size, vectors = torch.linalg.eigh((read_RKK.mT @ read_RKK).mean(0))
    root = size.clamp_min(0.0).sqrt()
    inverse = torch.where(root > 1e-8 * root.max(), 1.0 / root, 0.0)
    return Values((vectors * root) @ vectors.T @ made_RKK, read_RKK @ (vectors * inverse) @ vectors.T)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrix nearest to a square one: the polar factor."""
    left, _, right = torch.linalg.svd(matrix)
    return left @ right


def _lost_keys(keys_PRR: torch.Tensor, keys: Keys) -> torch.Tensor:
    made_PR, read_PR = keys.made_RP.T, keys.read_RP.T
    with_new_PR = (keys_PRR @ made_PR.conj()[:, :, None])[:, :, 0]
    new_P1 = (made_PR * with_new_PR).sum(1, keepdim=True).real
    old_PR = keys_PRR.diagonal(dim1=1, dim2=2).real
    return (old_PR - 2 * (read_PR.conj() * with_new_PR).real + read_PR.abs().square() * new_P1).sum()


def _lost_values(values_RKRK: torch.Tensor, values: Values) -> torch.Tensor:
    made_RKK, read_RKK = values
    with_new_RKK = torch.einsum("ajbk,blk->ajl", values_RKRK, made_RKK)
    new_KK = torch.einsum("rjk,rkl->jl", made_RKK, with_new_RKK)
    old = torch.einsum("rkrk->", values_RKRK)
    return old - 2 * (read_RKK * with_new_RKK).sum() + ((read_RKK @ new_KK) * read_RKK).sum()
