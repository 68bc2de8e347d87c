"""The results of a depth study as text."""

from textwrap import wrap
from typing import Any

from rich.table import Table

from launch.depth.findings import of_equal
from launch.tables import WIDTH, of_numbers, rendered


def costs_as_text(found: dict[str, Any]) -> str:
    """Render `launch.depth.findings.costs` as text: shapes, costs, and pipelines."""
    head = (
        f"{found['preset']}, sequences of {found['seq_len']:,} tokens, {found['vocab_size']:,} different ones; "
        f"{found['tokens']:,} tokens a run"
    )
    return rendered(head, *_shapes(found), _models(found), _pipelines(found))


def as_text(found: dict[str, Any]) -> str:
    """Render `launch.depth.findings.findings` as text."""
    lines = [costs_as_text(found), ""]
    for equal, order in found["orderings"].items():
        lines += _wrapped(_ordering(equal, order))
    lines += ["", "what is claimed, and what came out here:"]
    for claim in found["claims"]:
        lines += _wrapped(f"- {claim['source']}: {claim['claims']}.", "  ") + _wrapped(
            f"  Here: {claim['here']}.", "  "
        )
    lines += ["", "to be known:"]
    return "\n".join([*lines, *(line for note in found["notes"] for line in _wrapped(f"- {note}", "  "))])


def _shapes(found: dict[str, Any]) -> list[Table]:
    trained = "orderings" in found
    tables = []
    for equal in dict.fromkeys(shape["equal"] for shape in found["shapes"]):
        columns = ["aspect", "layers x width", "d_model/n_layers", equal, "off"]
        table = of_numbers(
            columns + ["rate", "loss", "spread", "seeds"] * trained, ["layers x width"], f"at equal {equal}"
        )
        for shape in of_equal(found, equal):
            row = [
                shape["aspect"],
                shape["name"],
                f"{shape['d_model_per_layer']:.3g}",
                f"{shape['cost']:,}" if shape["cost"] < 1e12 else f"{shape['cost']:.4g}",
                f"{shape['cost_off']:+.1%}",
            ]
            if trained:
                seeds = f"{len(shape['losses'])}"
                row += [
                    _number(shape["lr"], "g"),
                    _number(shape["mean"], ".4f"),
                    _number(shape["spread"], ".4f"),
                    seeds,
                ]
            table.add_row(*row)
        tables.append(table)
    return tables


def _models(found: dict[str, Any]) -> Table:
    columns = [
        "layers x width",
        "heads",
        "of them k/v",
        "d_ff",
        "parameters",
        "embedding",
        "FLOPs/token",
        "KV bytes/token",
    ]
    timed, title = "orderings" in found, "what each costs; embedding with head, KV cache in bf16"
    if timed:
        title += (
            f"; timed on {found['device']}, decoding at batch {found['decode_batch']}, context "
            f"{found['decode_context']:,}"
        )
    table = of_numbers(columns + ["tokens/s", "decode ms"] * timed, ["layers x width"], title)
    for model in found["models"]:
        row = [
            model["name"],
            f"{model['n_heads']}",
            f"{model['n_kv_heads']}",
            f"{model['d_ff']:,}",
            f"{model['parameters']:,}",
            f"{model['embedding_and_head'] / model['parameters']:.0%}",
            f"{model['flops_per_token']:.4g}",
            f"{model['kv_cache_bytes_per_token']:,}",
        ]
        if timed:
            seconds = model["decode_seconds"]
            row += [_number(model["tokens_per_s"], ",.0f"), _number(seconds and seconds * 1000, ".3g")]
        table.add_row(*row)
    return table


def _pipelines(found: dict[str, Any]) -> Table:
    pps = list(found["models"][0]["pipelines"])
    columns = [f"pp {pp}" for pp in pps]
    title = (
        f"bubble / by how much the slowest rank exceeds the mean, predicted: {found['schedule']}, "
        f"{found['micro_batches']} micro-batches; - has fewer layers than stages"
    )
    table = of_numbers(["layers x width", *columns], ["layers x width"], title)
    for model in found["models"]:
        cut = [model["pipelines"][pp] for pp in pps]
        table.add_row(model["name"], *(f"{one['bubble']:.1%} / {one['imbalance']:.1%}" if one else "-" for one in cut))
    return table


def _ordering(equal: str, order: dict[str, Any]) -> str:
    if order["best"] is None:
        return f"at equal {equal}: no shape has a loss"
    below = f"lower for each seed than {_names(order['best_below'])}"
    return (
        f"at equal {equal}: the least mean loss is that of {order['best']}, {below}. Of the preset, {order['preset']}: "
        f"lower for each seed {_names(order['below_preset'])}; higher {_names(order['above_preset'])}; not told apart "
        f"{_names(order['not_told_apart'])}."
    )


def _names(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return wrap(text, WIDTH, subsequent_indent=indent)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
