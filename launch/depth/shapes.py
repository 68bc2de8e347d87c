"""Models of a preset's kind with another aspect d_model / n_layers, of the same parameters or FLOPs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from launch.depth.settings import Equal
from model.config import ModelConfig

NEAR = 0.03
"""How far off its cost a shape may be without being called out."""
MOST = 0.1
"""How far off it may be at all."""
MOST_ASPECT = 2**0.5
"""The factor by which its aspect may miss the one that is asked for: half way to the next of the usual ones."""
COST_WEIGHT, HEADS_WEIGHT = 10.0, 0.25
"""How much worse than an aspect that is off, by its logarithm, a cost and a width of the heads are that are off."""


@dataclass(frozen=True)
class Shape:
    """A model of a comparison.

    Attributes:
        equal: what it has the same of as the preset.
        aspect: d_model / n_layers, as a multiple of the preset's, as it was asked for.
        model: the model.
        cost_off: how far its parameters or FLOPs are off the preset's, as a share of those.
    """

    equal: Equal
    aspect: Fraction
    model: ModelConfig
    cost_off: float

    @property
    def name(self) -> str:
        """Layers x width, as presets of the ladder are named."""
        return f"{self.model.n_layers}x{self.model.d_model}"


def cost_of(equal: Equal, model: ModelConfig, seq_len: int) -> int:
    """Return what models are made equal by.

    Args:
        equal: ``params``: parameters without those of embedding and head; ``flops``: FLOPs a token, forward and
            backward, of blocks and head (`ModelConfig.flops_per_token`).
        model: the model.
        seq_len: tokens of a sequence.
    """
    if equal is Equal.flops:
        return model.flops_per_token(seq_len)
    parts = model.params_by_part()
    return model.num_params - parts["embedding"] - parts["head"]


def of_size(base: ModelConfig, n_layers: int, d_model: int) -> ModelConfig:
    """Return a model of a preset's kind of another depth and width; at the preset's own, the preset itself.

    Heads have the preset's width, and groups as many query heads as the preset's. There are as many whole groups as
    are nearest to the preset's share of the width, so that heads together may be a little wider or narrower than the
    model. The feed-forward network has the preset's ratio to the width, rounded to a multiple of 256 as the paper's
    (arXiv 2401.02954, section 2.2), of 8 below a width of 512.
    """
    if d_model == base.d_model:
        return replace(base, n_layers=n_layers)
    scale = d_model / base.d_model
    groups = max(1, math.floor(base.n_kv_heads * scale + 0.5))
    multiple = 256 if d_model >= 512 else 8
    d_ff = max(1, math.floor(base.d_ff * scale / multiple + 0.5)) * multiple
    return replace(
        base,
        n_layers=n_layers,
        d_model=d_model,
        n_heads=groups * base.group_size,
        n_kv_heads=groups,
        head_dim=base.d_head,
        d_ff=d_ff,
    )


def score_of(base: ModelConfig, model: ModelConfig, equal: Equal, aspect: Fraction, seq_len: int) -> float:
    """Say how far a model is from what is asked for; 0 is exactly it."""
    cost = math.log(cost_of(equal, model, seq_len) / cost_of(equal, base, seq_len))
    width = math.log(model.n_heads * base.d_model / (base.n_heads * model.d_model))
    return abs(_aspect_off(base, model, aspect)) + COST_WEIGHT * abs(cost) + HEADS_WEIGHT * abs(width)


def _aspect_off(base: ModelConfig, model: ModelConfig, aspect: Fraction) -> float:
    return math.log(model.d_model * base.n_layers / (model.n_layers * base.d_model) / float(aspect))


def nearest_shape(base: ModelConfig, equal: Equal, aspect: Fraction, seq_len: int) -> Shape | None:
    """Return the shape nearest to an aspect, by `score_of`; None where all are too far off.

    Widths are multiples of a head's. Where there are shapes whose cost is within `NEAR`, it is one of those.

    Args:
        base: the preset's model.
        equal: what the shape has the same of.
        aspect: d_model / n_layers, as a multiple of the preset's.
        seq_len: tokens of a sequence.
    """
    if aspect == 1:
        return Shape(equal, aspect, base, 0.0)
    wanted = cost_of(equal, base, seq_len)
    near = [
        model
        for model in _candidates(base, equal, aspect, seq_len)
        if not model.problems()
        and abs(cost_of(equal, model, seq_len) / wanted - 1) <= MOST
        and abs(_aspect_off(base, model, aspect)) <= math.log(MOST_ASPECT)
    ]
    if not near:
        return None
    within = [model for model in near if abs(cost_of(equal, model, seq_len) / wanted - 1) <= NEAR]
    best = min(within or near, key=lambda model: score_of(base, model, equal, aspect, seq_len))
    return Shape(equal, aspect, best, cost_of(equal, best, seq_len) / wanted - 1)


def _candidates(base: ModelConfig, equal: Equal, aspect: Fraction, seq_len: int) -> Iterator[ModelConfig]:
    """Yield of each width the depths around the one of the wanted cost, where their aspect is near the wanted one."""
    wanted, unit = cost_of(equal, base, seq_len), base.d_head
    period = len(base.window_pattern or "s")  # cost is linear in it
    # Width grows as the cube root of the aspect where blocks are all of the cost, and never faster than the aspect.
    widest = base.d_model * max(1.0, float(aspect)) * 1.5
    for d_model in range(unit, math.ceil(widest / unit) * unit + 1, unit):
        one, two = (cost_of(equal, of_size(base, n * period, d_model), seq_len) for n in (1, 2))
        depth = period * (1 + (wanted - one) / (two - one))
        exact = d_model * base.n_layers / (base.d_model * float(aspect))
        least = max(1, math.floor(depth) - 1 - period, math.ceil(exact / MOST_ASPECT))
        most = min(math.ceil(depth) + 1 + period, math.floor(exact * MOST_ASPECT))
        for n_layers in range(least, most + 1):
            yield of_size(base, n_layers, d_model)


def shapes_of(
    base: ModelConfig, equals: Sequence[Equal], aspects: Sequence[Fraction], seq_len: int
) -> tuple[list[Shape], list[str]]:
    """Return the shape of each aspect and equality, and a sentence for each that there is no shape of."""
    found, missing = list[Shape](), list[str]()
    for equal in equals:
        taken: dict[str, Fraction] = {}
        for aspect in aspects:
            shape = nearest_shape(base, equal, aspect, seq_len)
            if shape is None:
                missing.append(
                    f"{said(aspect)} at equal {equal.value}: no whole number of layers makes a model within "
                    f"{MOST:.0%} of the preset's {equal.value} and a factor of {MOST_ASPECT:.2f} of that aspect"
                )
            elif shape.name in taken:
                missing.append(
                    f"{said(aspect)} at equal {equal.value}: the nearest shape, {shape.name}, is also that of "
                    f"{said(taken[shape.name])}"
                )
            else:
                taken[shape.name] = aspect
                found.append(shape)
    return found, missing


def said(aspect: Fraction) -> str:
    """Write an aspect as a multiple of the preset's, such as 8x and 1/8x."""
    return f"{aspect}x"
