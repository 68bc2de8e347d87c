"""The results of a scaling study as text."""

from textwrap import wrap
from typing import Any

from launch.scaling.findings import law_of
from launch.tables import WIDTH, of_numbers, rendered

_LAWS = (
    ("lr", "peak rate"),
    ("batch_tokens", "batch, tokens"),
    ("m", "M, FLOPs a token"),
    ("tokens", "tokens"),
)


def as_text(found: dict[str, Any]) -> str:
    """Render `launch.scaling.findings.findings` as text."""
    head = (
        f"{len(found['runs'])} runs on {found['train_tokens']:,} tokens of {found['data']}, {found['vocab_size']:,} "
        f"different ones, in sequences of {found['seq_len']:,}; compute C = M D, without embedding and head"
    )
    parts = [head, *_grid(found), _isoflop(found), _laws(found)]
    return "\n".join([rendered(*parts), "", *_losses(found), *_further(found), "", "to be known:", *_notes(found)])


def _grid(found: dict[str, Any]) -> list[Any]:
    if found["rates"] is None:
        return []
    table = of_numbers(
        ["C", "model", "tokens", "best rate", "batch", "loss", "near-optimal", "diverged"],
        ["model"],
        f"rate and batch, near-optimal within {found['rates']['band']:.2%} of the best",
    )
    for one in found["rates"]["budgets"]:
        best = one["best"] or {}
        table.add_row(
            f"{one['compute']:.3g}",
            one["shape"],
            f"{one['tokens']:,}",
            _number(best.get("lr"), ".3g"),
            _number(best.get("batch_tokens"), ",d"),
            _number(best.get("loss"), ".4f"),
            f"{one['near_optimal']} of {one['tried']}",
            f"{one['diverged']}",
        )
    return [table]


def _isoflop(found: dict[str, Any]) -> Any:
    columns = ["C", "rate", "batch", "sizes", "M from", "to", "best M", "tokens", "loss", "minimum"]
    table = of_numbers(columns, ["minimum"], "the least loss of each compute, by a parabola through its sizes")
    for curve in found["allocation"]["curves"]:
        runs = [run for run in found["runs"] if run["kind"] == "isoflop" and run["budget"] == curve["compute"]]
        where = "none" if curve["why"] else "measured" if curve["measured"] else "outside"
        table.add_row(
            f"{curve['compute']:.3g}",
            f"{runs[0]['lr']:.3g}",
            f"{runs[0]['batch_tokens']:,}",
            f"{curve['sizes']}",
            f"{min(run['m'] for run in runs):.3g}",
            f"{max(run['m'] for run in runs):.3g}",
            _number(curve["m"], ".3g"),
            _number(curve["tokens"], ".3g"),
            f"{curve['lowest']:.4f}",
            where,
        )
    return table


def _laws(found: dict[str, Any]) -> Any:
    columns = ["law", "fitted here", "95 % of coefficient", "95 % of exponent", "from, FLOPs", "to", "the paper's"]
    (rates, grid), (allocation, _) = found["paper"]["lr"]["fitted"], found["paper"]["m"]["fitted"]
    most = found["paper"]["m"]["fitted"][1]
    title = (
        "laws and their 95 % intervals, beside the paper's, "
        f"fitted from {min(rates, allocation):.0e} to {grid:.0e} (rate, batch) and {most:.0e} FLOPs"
    )
    table = of_numbers(columns, ["law", "fitted here", "the paper's"], title)
    for name, said in _LAWS:
        law, paper = law_of(found, name), found["paper"][name]
        own = ["not tried" if name in ("lr", "batch_tokens") and found["rates"] is None else "none"] + ["-"] * 4
        if law:
            own = [
                _power_law(law),
                _interval(law["coefficient_interval"], ".3g"),
                _interval(law["exponent_interval"], ".3f"),
                *(f"{compute:.3g}" for compute in law["fitted"]),
            ]
        table.add_row(said, *own, _power_law(paper))
    return table


def _losses(found: dict[str, Any]) -> list[str]:
    allocated, lines = found["allocation"], []
    if law := allocated["loss"]:
        lines.append(
            f"least loss = {law['floor']:.3f} {_interval(law['floor_interval'], '.3f')} + {law['scale']:.4g} "
            f"C^-{law['exponent']:.4f} {_interval(law['exponent_interval'], '.3f')} nats"
        )
    if held := allocated["held_out"]:
        lines.append(
            f"held out: the loss at {held['compute']:.3g} FLOPs, {held['measured']:.4f}, predicted from "
            f"{held['fitted'][0]:.3g} to {held['fitted'][1]:.3g} FLOPs"
        )
        lines += [
            f"  by {one['law']:14} {one['loss']:.4f} {_interval(one['interval'], '.4f')}, {one['error']:+.2%} off"
            for one in held["predictions"]
        ]
    return lines


def _further(found: dict[str, Any]) -> list[str]:
    further = found["further"]
    given = [
        f"  {said:17} {further[name]:.3g} (the paper's: {further['paper'][name]:.3g})"
        for name, said in _LAWS
        if further[name] is not None
    ]
    return [f"for {further['compute']:.3g} FLOPs these laws give", *given] if given else []


def _notes(found: dict[str, Any]) -> list[str]:
    return [line for note in found["notes"] for line in wrap(f"- {note}", WIDTH, subsequent_indent="  ")]


def _interval(ends: list[float] | None, form: str) -> str:
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]" if ends else "[?]"


def _power_law(law: dict[str, Any]) -> str:
    return f"{law['coefficient']:.4g} C^{law['exponent'] + 0.0:.4f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
