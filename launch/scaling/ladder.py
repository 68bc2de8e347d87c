"""The shapes of a scaling study: depth and width chosen so that their M stand where they are wanted."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from launch.trainings.asked import shape_overrides
from model.config import ModelConfig
from model.problems import BadInput, either

DECADE = 10.0
"""The largest M of a budget over the smallest."""
ASPECT_WEIGHT = 0.5
"""How far a shape may leave the preset's aspect: as much as its M may leave the one that is wanted, times this."""


@dataclass(frozen=True, order=True)
class Shape:
    """The depth and the width of a model.

    Attributes:
        n_layers, d_model: as in `ModelConfig`.
    """

    n_layers: int
    d_model: int

    @staticmethod
    def of(text: str) -> "Shape":
        """Read a shape such as ``8x512``, layers x width, as the presets of the ladder are named.

        Raises:
            BadInput: the text is none.
        """
        if found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text):
            return Shape(int(found[1]), int(found[2]))
        raise BadInput([f"scaling.shapes={text}: no shape; layers x width, such as 8x512, would work"])

    def __str__(self) -> str:
        return f"{self.n_layers}x{self.d_model}"


@dataclass(frozen=True)
class Ladder:
    """Models of a preset's kind in other sizes.

    A model of a width has heads of the preset's width, groups of as many query heads as the preset's (or the nearest
    smaller number that divides its heads), and a feed-forward network of 8/3 of its width, rounded up to a multiple of
    256 as the paper's (arXiv 2401.02954, section 2.2), of 16 below a width of 512. So M = 72 L d^2 + 12 L d s is what a
    model without groups computes, up to that rounding.

    Attributes:
        base: the preset's model.
        seq_len: tokens of a sequence.
    """

    base: ModelConfig
    seq_len: int

    def m(self, shape: Shape) -> int:
        """Return M of a shape, the non-embedding FLOPs a token (section 3.2)."""
        return replace(self.base, n_layers=shape.n_layers, d_model=shape.d_model).scaling_m(self.seq_len)

    def model(self, shape: Shape) -> ModelConfig:
        """Return the model of a shape, whose width is a multiple of the width of a head."""
        heads = shape.d_model // self.base.d_head
        wanted = max(1, heads // self.base.group_size)
        kv_heads = max(n for n in range(1, wanted + 1) if heads % n == 0)
        return replace(
            self.base,
            n_layers=shape.n_layers,
            d_model=shape.d_model,
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=self.base.d_head,
            d_ff=ffn_width(shape.d_model),
        )

    def overrides(self, shape: Shape) -> list[str]:
        """Return the overrides that make the preset a shape."""
        return shape_overrides(self.model(shape))

    def problem(self, shape: Shape) -> str | None:
        """Say why there is no model of a shape; None where there is one."""
        width = self.base.d_head
        if shape.d_model % width == 0:
            return None
        below = shape.d_model // width * width
        works = either("scaling.shapes", [f"{shape.n_layers}x{d}" for d in (below, below + width) if d])
        return f"scaling.shapes={shape}: {shape.d_model} is no multiple of the {width} of a head; {works} would work"

    def around(self, m: float, sizes: int) -> list[Shape]:
        """Return shapes whose M span a decade around an M evenly by its logarithm, as nearly as shapes can.

        The aspect d_model / n_layers is the preset's as nearly as that allows.

        Args:
            m: the M in the middle.
            sizes: the number of shapes.

        Returns:
            Different ones by rising M.
        """
        chosen: list[Shape] = []
        for target in m * DECADE ** (np.linspace(-0.5, 0.5, sizes) if sizes > 1 else np.zeros(1)):
            # Small models cannot stand everywhere: what is taken already is followed by the next larger.
            least = self.m(chosen[-1]) if chosen else 0
            candidates = [shape for shape in self._near(max(float(target), least)) if self.m(shape) > least]
            chosen.append(min(candidates, key=lambda shape: self._distance(shape, float(target))))
        return chosen

    def _near(self, m: float) -> list[Shape]:
        """Return shapes of every width, each of the depths around the one that has this M."""
        found, d_head = [], self.base.d_head
        for heads in range(1, math.ceil(math.sqrt(m / 72) / d_head) + 2):
            width = heads * d_head
            layers = int(m / self.m(Shape(1, width)))
            found += [Shape(n, width) for n in range(max(layers, 1), layers + 3)]
        return found

    def _distance(self, shape: Shape, m: float) -> float:
        aspect = self.base.d_model / self.base.n_layers
        off = abs(math.log(shape.d_model / shape.n_layers / aspect))
        return abs(math.log(self.m(shape) / m)) + ASPECT_WEIGHT * off


def ffn_width(d_model: int) -> int:
    """Return the inner width of the feed-forward network of a ladder's model."""
    multiple = 256 if d_model >= 512 else 16
    return math.ceil(8 * d_model / 3 / multiple) * multiple


def embedding_share(model: ModelConfig) -> float:
    """Return the share of the parameters that is embedding and head, which M does not count."""
    parts = model.params_by_part()
    return (parts["embedding"] + parts["head"]) / model.num_params


def shapes_of(texts: Sequence[str], ladder: Ladder) -> tuple[list[Shape], list[str]]:
    """Read the shapes that are asked for, by rising M; and say in a sentence each which there cannot be."""
    found, problems = [], []
    for text in texts:
        try:
            shape = Shape.of(text)
        except BadInput as error:
            problems += error.problems
            continue
        if problem := ladder.problem(shape):
            problems.append(problem)
        elif shape in found:
            problems.append(f"scaling.shapes: {shape} stands there twice; once would work")
        else:
            found.append(shape)
    return sorted(found, key=ladder.m), problems
