"""What papers say of depth against width, and what came out here."""

import math
from collections.abc import Callable, Iterable
from typing import Any


def verdicts(found: dict[str, Any]) -> list[dict[str, str]]:
    """Return each claim with its ``source``, what it ``claims``, and what came out ``here``, as sentences.

    Args:
        found: the shapes with their losses, and the orderings, of `launch.depth.findings.findings`.
    """
    return [
        {
            "source": source,
            "claims": claims,
            "here": "; ".join(filter(None, (judge(found, equal) for equal in found["orderings"]))) or _NOTHING,
        }
        for source, claims, judge in _CLAIMS
    ]


def with_all_seeds(shapes: Iterable[dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """Return the shapes that have a loss for each seed: means over other seeds do not compare."""
    return [shape for shape in shapes if len(shape["losses"]) == seeds]


def _shapes(found: dict[str, Any], equal: str) -> list[dict[str, Any]]:
    return with_all_seeds((one for one in found["shapes"] if one["equal"] == equal), len(found["seeds"]))


def _deeper(found: dict[str, Any], equal: str) -> str:
    """Count the shapes deeper and shallower than the preset whose losses are lower for each seed."""
    if len(found["seeds"]) < 2:
        return f"at equal {equal}, not judged: one seed"
    order, shapes = found["orderings"][equal], _shapes(found, equal)
    preset = next((shape for shape in shapes if shape["is_preset"]), None)
    if preset is None:
        return f"at equal {equal}, not judged: the preset has no loss for each seed"
    said = []
    for which, of_kind in (
        ("deeper", [shape["name"] for shape in shapes if shape["n_layers"] > preset["n_layers"]]),
        ("shallower", [shape["name"] for shape in shapes if shape["n_layers"] < preset["n_layers"]]),
    ):
        better, worse = (len(set(of_kind) & set(order.get(key, ()))) for key in ("below_preset", "above_preset"))
        said.append(
            f"of {len(of_kind)} {which} shapes {better} have a lower loss than the preset for each seed, and {worse} "
            "a higher one"
        )
    return f"at equal {equal}, {', and '.join(said)}"


def _range(found: dict[str, Any], equal: str) -> str:
    """Say by how much mean losses differ over all aspects."""
    shapes = _shapes(found, equal)
    if len(shapes) < 2:
        return ""
    means, aspects = [shape["mean"] for shape in shapes], [shape["d_model_per_layer"] for shape in shapes]
    return (
        f"at equal {equal}, mean losses differ by {max(means) / min(means) - 1:.1%} over aspects d_model / n_layers "
        f"from {min(aspects):.3g} to {max(aspects):.3g}, a factor of {max(aspects) / min(aspects):.3g}"
    )


def _threshold(found: dict[str, Any], equal: str) -> str:
    """Say where the best shape stands beside the depth log3(d_model)."""
    shapes = _shapes(found, equal)
    if not shapes:
        return ""
    few = [shape["name"] for shape in shapes if shape["n_layers"] < math.log(shape["d_model"], 3)]
    best = min(shapes, key=lambda shape: shape["mean"])
    return (
        f"at equal {equal}, {', '.join(few) if few else 'no shape'} {'have' if len(few) != 1 else 'has'} fewer layers "
        f"than that, and the least mean loss is that of {best['name']}, where log3 d_model is "
        f"{math.log(best['d_model'], 3):.1f}"
    )


_NOTHING = "not judged: too few shapes have a loss for each seed"
_CLAIMS: tuple[tuple[str, str, Callable[[dict[str, Any], str], str]], ...] = (
    (
        "DeepSeek LLM, arXiv 2401.02954, section 2.2",
        'the 67B was expanded in depth (95 layers) rather than in the width of its feed-forward networks, "aiming for '
        'better performance"; no comparison is published',
        _deeper,
    ),
    (
        "Kaplan et al., arXiv 2001.08361, section 3.1",
        "at a fixed number of parameters without embedding the loss depends weakly on the shape: a few percent while "
        "the aspect varies by a factor of 40",
        _range,
    ),
    (
        "Levine et al., arXiv 2006.12467",
        "depth is worth more than width up to about log3 of the width in layers; beyond, both are worth about the "
        "same, so that deeper networks need to be wider too",
        _threshold,
    ),
    (
        "Tay et al., arXiv 2109.10686 (DeepNarrow)",
        "models deeper and narrower than the usual ones are better at equal cost, up to some 32 to 36 layers",
        _deeper,
    ),
)
"""Sources, what they claim, and what says what came out at an equality."""
