"""What the heads of models hold: how many different patterns they attend by, and how alike the values are they read.

Two query heads attend alike where the Jensen-Shannon divergence of their attention maps is small: in bits, averaged
over queries, it is 0 for equal maps and 1 for maps that have no key in common. One less it is a positive semi-definite
kernel (Martins et al., Nonextensive Information Theoretic Kernels on Measures, JMLR 10, 2009), as are the two kernels
of values here, so that each has an effective number of different heads: the exponential of the entropy of the
eigenvalues of the similarity matrix over the number of heads (the Vendi score of Friedman and Dieng, arXiv 2210.02410).

B rows, L tokens, D width, H query heads, G key/value heads (H = G x R), K head width, Q queries of a row, M keys.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launch.bench.common import device_here
from model.batch import Batch
from model.config import AttentionBackend, ModelConfig
from model.context import Context
from model.documents import Documents
from model.kernels import KERNELS, chosen
from model.loss import IGNORED
from model.stand_ins import StandIns, standing_in
from model.transformer import Block, Head
from model.varlen import visible
from model.weights import Weights, loaded_layers
from train.palette import SCALE, color_of, look_of

ROWS, QUERIES = 32, 64
"""The number of rows, and of queries of a row, evenly spaced over it, whose maps are compared."""
_ROOM = 2**24
"""The number of attention weights of all heads that are in memory at a time."""


@torch.no_grad()
def head_findings(
    models: Mapping[str, Weights],
    batches: Sequence[Batch],
    say: Callable[[str], object],
    rows: int = ROWS,
    queries: int = QUERIES,
) -> dict[str, Any]:
    """Measure what the heads of each model hold, on the same rows; one layer of one model is in memory at a time.

    Queries and keys are those that the model's own attention hands to its kernel, rotated, and seen are the keys that
    its window and the documents let a query see. A query that sees itself alone has one map in every head, and is not
    compared.

    Args:
        models: the weights by the name of the model. Names are in the order in which they are to be shown.
        batches: held-out rows, int64 (B, L) each. A row without any label is padding, and is not measured.
        say: the function that reports progress.
        rows: the most rows that are measured, the first ones.
        queries: the most queries of a row that are compared; of longer rows evenly spaced ones, the last among them.

    Returns:
        A dict for JSON: ``rows`` and ``queries``, how many were measured; ``models``, a list of
        ``name``, ``attention``, ``heads``, ``kv_heads``, ``layers``, and ``mean`` over the layers. A layer is

        - ``patterns``: the effective number of different attention maps, from 1 to H;
        - ``distance``: the mean Jensen-Shannon divergence of two heads' maps in bits, over ``sharing`` pairs and pairs
          ``apart``, by the number of key/value heads (``"4"``) by which pairs share one: those of every model, so that
          the same pairs are seen before and after neighbours are grouped. None where there is no such pair;
        - ``entropy``: the mean entropy of a map in bits; ``reach``: the mean number of tokens that it looks back;
        - ``values``: the effective number of different value heads, from 1 to G, by linear CKA of what they compute
          on the rows (Kornblith et al., arXiv 1905.00414); ``cka``: its mean over pairs, None for one head;
        - ``subspace``: the mean over pairs of value heads of the squared cosines of the principal angles between the
          row spaces of their matrices, from 0, orthogonal, to 1, the same; None for one head. Spaces drawn at random
          have K / D, the ``subspace_by_chance`` of a model;
        - ``similarity``: one less the divergence of each two heads, H x H.
    """
    assert models and batches and rows >= 1 and queries >= 1
    groupings = sorted({weights.config.n_kv_heads for weights in models.values()}, reverse=True)
    measured = _measured(batches, rows)
    found, compared = [], 0
    for number, (name, weights) in enumerate(models.items(), 1):
        say(f"heads of {name}, {number} of {len(models)}")
        config = weights.config
        layers = []
        for watch, block in _watched(weights, batches[: len(measured)], measured, queries):
            layers.append({**watch.findings(config, groupings), **_subspaces(block, config)})
            compared = watch.compared
        found.append(
            {
                "name": name,
                "attention": config.attention_name,
                "heads": config.n_heads,
                "kv_heads": config.n_kv_heads,
                "subspace_by_chance": config.d_head / config.d_model,
                "layers": layers,
                "mean": _mean([{key: one[key] for key in one if key != "similarity"} for one in layers]),
            }
        )
    return {"rows": sum(map(sum, measured)), "queries": compared, "models": found}


def attention_maps(
    q_LHK: torch.Tensor, k_LGK: torch.Tensor, positions_L: torch.Tensor, window: int | None, queries: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Compute the attention maps of all heads at some queries of a row, as many at a time as fit `_ROOM`.

    Args:
        q_LHK, k_LGK: queries and keys of a row as the attention kernel gets them.
        positions_L: int64, the position of each token in its document.
        window: that of the block.
        queries: the most queries, of which those that see themselves alone are left out.

    Yields:
        int64 (Q,), the places of the queries; and fp32 (H, Q, L), their attention weights.
    """
    (L, H, K), G = q_LHK.shape, k_LGK.shape[1]
    seen_LL = visible(positions_L.unsqueeze(0), window)[0]
    # Rounded differences of at least one are different places.
    places = torch.linspace(0, L - 1, min(queries, L)).round().long() if queries > 1 else torch.tensor([L - 1])
    places = places.to(q_LHK.device)
    places = places[seen_LL[places].sum(1) > 1]
    for of in places.split(max(1, _ROOM // (H * L))):
        q_QGRK = q_LHK[of].float().unflatten(1, (G, H // G))  # R query heads read each of the G key heads
        scores_GRQL = torch.einsum("qgrk,lgk->grql", q_QGRK, k_LGK.float()) / math.sqrt(K)
        yield of, scores_GRQL.masked_fill(~seen_LL[of], -math.inf).softmax(-1).flatten(0, 1)


def divergences(maps_HQM: torch.Tensor) -> torch.Tensor:
    """The Jensen-Shannon divergence of each two heads' maps in bits, summed over the queries, fp64 (H, H)."""
    entropies_H, H = _entropies(maps_HQM).sum(1, dtype=torch.float64), len(maps_HQM)
    found_HH = torch.zeros(H, H, dtype=torch.float64, device=maps_HQM.device)
    for head in range(H - 1):
        mixed_hQM = (maps_HQM[head + 1 :] + maps_HQM[head]) / 2
        of_both = (entropies_H[head + 1 :] + entropies_H[head]) / 2
        found_HH[head, head + 1 :] = _entropies(mixed_hQM).sum(1, dtype=torch.float64) - of_both
    return (found_HH + found_HH.T).clamp(min=0)  # rounding may leave less than nothing


def effective_number(similarity_NN: torch.Tensor) -> float:
    """The exponential of the entropy of the eigenvalues of a similarity matrix over N (arXiv 2210.02410, section 3).

    Args:
        similarity_NN: positive semi-definite, with ones on its diagonal.

    Returns:
        1.0 where all N are the same, N where no two have anything in common.
    """
    values_N = torch.linalg.eigvalsh(similarity_NN.double() / len(similarity_NN)).clamp(min=0)
    return float(torch.special.entr(values_N).sum().exp())


def subspace_similarity(weights_NKD: torch.Tensor) -> torch.Tensor:
    """The mean squared cosine of the principal angles between the row spaces of matrices, fp64 (N, N).

    Of spaces of different dimensions r and s, as of matrices that have lost rank, the squared cosines are summed and
    divided by the root of r s.
    """
    _, scales_NK, basis_NKD = torch.linalg.svd(weights_NKD.double(), full_matrices=False)
    least_N1 = scales_NK[:, :1] * max(weights_NKD.shape[1:]) * torch.finfo(torch.float32).eps
    kept_NK = scales_NK > least_N1.clamp(min=torch.finfo(torch.float32).tiny)
    basis_NKD = basis_NKD * kept_NK.unsqueeze(2)
    cosines_NN = torch.einsum("nkd,mjd->nmkj", basis_NKD, basis_NKD).square().sum((2, 3))
    ranks_N = kept_NK.sum(1).clamp(min=1)
    return (cosines_NN / (ranks_N.unsqueeze(1) * ranks_N).sqrt()).fill_diagonal_(1)


class _Watch:
    """Runs in the place of an attention kernel, and sums up what the heads of a layer do in each call.

    Args:
        queries: the most queries of a row.

    Attributes:
        measured_B: which rows of the call to come are measured.
        compared: how many queries have been.
    """

    def __init__(self, queries: int):
        self._queries = queries
        self.compared = 0
        self.measured_B: Sequence[bool] = ()
        self._divergence: torch.Tensor | float = 0.0
        self._entropy = self._reach = 0.0
        self._tokens = 0
        self._value_sum: torch.Tensor | float = 0.0
        self._value_products: torch.Tensor | float = 0.0

    def __call__(
        self,
        q_BLHK: torch.Tensor,
        k_BLGK: torch.Tensor,
        v_BLGK: torch.Tensor,
        documents: Documents | None,
        window: int | None = None,
    ) -> torch.Tensor:
        """Return the attention's output (B, L, H, K), of the kernel that would run without this."""
        whole_L = torch.arange(q_BLHK.shape[1], device=q_BLHK.device)
        for row, measured in enumerate(self.measured_B):
            if measured:
                positions_L = documents.positions_BL[row] if documents else whole_L
                self._add(q_BLHK[row], k_BLGK[row], v_BLGK[row], positions_L, window)
        asked = (q_BLHK.device, q_BLHK.dtype, documents is not None, window is not None)
        backend, _ = chosen(AttentionBackend.auto, *asked)
        return KERNELS[backend](q_BLHK, k_BLGK, v_BLGK, documents, window)

    def _add(
        self,
        q_LHK: torch.Tensor,
        k_LGK: torch.Tensor,
        v_LGK: torch.Tensor,
        positions_L: torch.Tensor,
        window: int | None,
    ) -> None:
        keys_L = torch.arange(len(q_LHK), device=q_LHK.device)
        for places_Q, maps_HQL in attention_maps(q_LHK, k_LGK, positions_L, window, self._queries):
            self._divergence = self._divergence + divergences(maps_HQL)
            self._entropy += float(_entropies(maps_HQL).mean(0).sum())
            back_QL = places_Q.unsqueeze(1) - keys_L
            self._reach += float((maps_HQL * back_QL).sum(2).mean(0).sum())
            self.compared += len(places_Q)
        values_LC = v_LGK.flatten(1).double()  # C = G x K
        self._value_sum = self._value_sum + values_LC.sum(0)
        self._value_products = self._value_products + values_LC.T @ values_LC
        self._tokens += len(values_LC)

    def findings(self, config: ModelConfig, groupings: Sequence[int]) -> dict[str, Any]:
        """Return what a layer of `head_findings` has, but for its subspaces."""
        count = max(self.compared, 1)  # without any query that sees two keys, all maps are the same
        divergence_HH = torch.zeros(config.n_heads, config.n_heads) + torch.as_tensor(self._divergence).cpu() / count
        cka_GG = self._cka(config.n_kv_heads)
        return {
            "patterns": effective_number(1 - divergence_HH),
            "distance": {
                str(groups): _by_group(divergence_HH, groups) for groups in groupings if not config.n_heads % groups
            },
            "entropy": self._entropy / count,
            "reach": self._reach / count,
            "values": effective_number(cka_GG),
            "cka": _over_pairs(cka_GG),
            "similarity": (1 - divergence_HH).tolist(),
        }

    def _cka(self, heads: int) -> torch.Tensor:
        """Return linear CKA of each two value heads, fp64 (G, G) on the CPU; a head that is constant is like none."""
        mean_C = torch.as_tensor(self._value_sum) / self._tokens
        covariance_CC = torch.as_tensor(self._value_products) / self._tokens - torch.outer(mean_C, mean_C)
        blocks_GKGK = covariance_CC.unflatten(1, (heads, -1)).unflatten(0, (heads, -1))
        alignment_GG = blocks_GKGK.square().sum((1, 3)).cpu()
        scale_G = alignment_GG.diagonal().sqrt()
        return (alignment_GG / torch.outer(scale_G, scale_G)).nan_to_num(0).fill_diagonal_(1)


def _measured(batches: Sequence[Batch], rows: int) -> list[list[bool]]:
    """Return which rows of the first batches are measured: so many, and none that is padding."""
    found: list[list[bool]] = []
    for batch in batches:
        if rows <= 0:
            break
        labelled_B = (batch.labels != IGNORED).any(1)
        found.append((labelled_B & (labelled_B.cumsum(0) <= rows)).tolist())
        rows -= sum(found[-1])
    return found


def _watched(
    weights: Weights, batches: Sequence[Batch], measured: Sequence[Sequence[bool]], queries: int
) -> Iterator[tuple[_Watch, Block]]:
    """Run rows through a model, one layer after another; yield each block with what its attention has done."""
    device, _ = device_here()
    batches = [batch.to(device) for batch in batches]
    hidden = [batch.tokens for batch in batches]
    contexts = [Context(documents=batch.documents) for batch in batches]
    for _, layer in loaded_layers(weights):
        if isinstance(layer, Head):
            return
        layer.to(device)
        if not isinstance(layer, Block):
            hidden = [layer(x) for x in hidden]
            continue
        layer.attention.backend = AttentionBackend.auto  # nothing stands in for the reference
        watch = _Watch(queries)
        with standing_in(StandIns(compiled=lambda formula: formula, attention=watch)):
            for at, context in enumerate(contexts):
                watch.measured_B = measured[at]
                hidden[at] = layer(hidden[at], context)
        yield watch, layer


def _subspaces(block: nn.Module, config: ModelConfig) -> dict[str, Any]:
    weight: torch.Tensor = block.attention.qkv.v_proj.weight  # type: ignore[union-attr, assignment]
    return {"subspace": _over_pairs(subspace_similarity(weight.unflatten(0, (-1, config.d_head))).cpu())}


def _entropies(maps_HQM: torch.Tensor) -> torch.Tensor:
    """In bits, (H, Q)."""
    # The least normal number in the place of 0, whose logarithm is finite: a third faster than torch.special.entr.
    return -(maps_HQM * maps_HQM.clamp(min=torch.finfo(torch.float32).tiny).log2()).sum(2)


def _over_pairs(matrix_NN: torch.Tensor) -> float | None:
    pairs = [float(matrix_NN[pair]) for pair in combinations(range(len(matrix_NN)), 2)]
    return sum(pairs) / len(pairs) if pairs else None


def _by_group(matrix_HH: torch.Tensor, groups: int) -> dict[str, float | None]:
    """Average over the pairs of heads that share a group, and over the others."""
    size = len(matrix_HH) // groups
    pairs: dict[str, list[float]] = {"sharing": [], "apart": []}
    for one, other in combinations(range(len(matrix_HH)), 2):
        pairs["sharing" if one // size == other // size else "apart"].append(float(matrix_HH[one, other]))
    return {kind: sum(found) / len(found) if found else None for kind, found in pairs.items()}


def _mean(layers: Sequence[Any]) -> Any:
    """Average numbers over layers, inside dicts as well; None where a layer has none."""
    if isinstance(layers[0], dict):
        return {key: _mean([layer[key] for layer in layers]) for key in layers[0]}
    return None if any(one is None for one in layers) else sum(layers) / len(layers)


# ---- tables and pictures ----


def head_table(found: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Return the columns of a table of `head_findings`, and a row for each model: means over its layers."""
    columns = ["model", "patterns", "of heads", "bits apart, sharing", "bits apart, others", "entropy, bits"]
    columns += ["tokens back", "values", "of value heads", "CKA", "subspaces", "by chance"]
    rows = []
    for model in found["models"]:
        mean = model["mean"]
        own = mean["distance"][str(model["kv_heads"])]
        row = [model["name"], mean["patterns"], model["heads"], own["sharing"], own["apart"], mean["entropy"]]
        row += [mean["reach"], mean["values"], model["kv_heads"], mean["cka"], mean["subspace"]]
        rows.append([*row, model["subspace_by_chance"]])
    return columns, rows


def draw_heads(by_seed: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw the effective numbers by layer, a line for each model, and the similarity of heads in one layer.

    Args:
        by_seed: `head_findings` of the same models for each seed, at least one: lines are means, bands from the least
            to the most. Matrices are those of the first.
        folder: the folder of the files, ``heads.png`` and ``head-similarity.png``.
    """
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    return [_draw_numbers(by_seed, folder / "heads.png"), _draw_matrices(by_seed[0], folder / "head-similarity.png")]


def _draw_numbers(by_seed: Sequence[Mapping[str, Any]], path: Path) -> Path:
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, both = pyplot.subplots(1, 2, figsize=(9.6, 4.4), layout="constrained")
    kinds = {"patterns": "different attention maps", "values": "different value heads"}
    for axes, (key, label) in zip(both, kinds.items(), strict=True):
        for index, model in enumerate(by_seed[0]["models"]):
            lines = torch.tensor([[layer[key] for layer in one["models"][index]["layers"]] for one in by_seed])
            numbers = range(1, lines.shape[1] + 1)
            axes.plot(numbers, lines.mean(0), label=model["name"], markersize=4, **look_of(index))
            axes.fill_between(numbers, lines.amin(0), lines.amax(0), color=color_of(index), alpha=0.2, linewidth=0)
        axes.set_xlabel("layer")
        axes.set_ylabel(f"effective number of {label}")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    both[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _draw_matrices(found: Mapping[str, Any], path: Path) -> Path:
    """Draw the layer in which the models' numbers of patterns are furthest from each other."""
    from matplotlib import pyplot

    models = found["models"]

    def spread(layer: int) -> float:
        numbers = [model["layers"][layer]["patterns"] for model in models]
        return max(numbers) - min(numbers)

    layer = max(range(min(len(model["layers"]) for model in models)), key=spread)
    figure, axes = pyplot.subplots(1, len(models), figsize=(2.6 * len(models) + 1, 3.4), layout="constrained")
    shown = [axes] if len(models) == 1 else list(axes)
    for one, model in zip(shown, models, strict=True):
        image = one.imshow(model["layers"][layer]["similarity"], vmin=0, vmax=1, cmap=SCALE)
        one.set_title(f"{model['name']}\n{model['layers'][layer]['patterns']:.2f} patterns", fontsize="small")
        one.set(xticks=[], yticks=[])
        size = model["heads"] // model["kv_heads"]
        for border in range(size, model["heads"], size):  # heads between two lines share a key/value head
            one.axhline(border - 0.5, color="white", linewidth=0.8)
            one.axvline(border - 0.5, color="white", linewidth=0.8)
    figure.colorbar(image, ax=shown, label="similarity of attention maps")
    figure.suptitle(f"query heads of layer {layer + 1}", fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
