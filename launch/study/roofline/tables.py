"""Findings of `launch.study.roofline.findings` as text."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill
from typing import Any

from rich.table import Table

from launch.study.roofline.counts import Phase
from launch.study.roofline.findings import MOST_CONTEXT, PARTED
from launch.tables import of_numbers, rendered

GIB, KIB = 2**30, 2**10
WIDTH = 1000
"""The most characters of a line of a table: no column is left out, however many models there are."""
LINE = 118
"""The most characters of a line of text."""


def as_text(found: Mapping[str, Any]) -> str:
    """Render findings as text: what they are of, tables of each phase, and what they say by rule.

    Args:
        found: the result of `launch.study.roofline.findings.roofline_findings`, or of
            `launch.study.roofline.measured.measured_findings`.
    """
    phases = (Phase.decode, Phase.prefill)
    parts = [_head(found), _models(found), *(_seconds(found, phase) for phase in phases)]
    parts += [_measured_seconds(found, phase) for phase in phases if any(_timed(found, phase))]
    parts += [_crossings(found), _bounds(found)]
    if found["device"]["memory_bytes"] is not None:
        parts.append(_fits(found))
    parts += [fill(line, LINE) for line in conclusions(found)]
    return "\n\n".join(part.strip("\n") for part in parts)


def _head(found: Mapping[str, Any]) -> str:
    device = found["device"]
    rank = f", each of {found['tp']} tensor-parallel ranks" if found["tp"] > 1 else ""
    window = f", a window of {found['window']:,} tokens in {_sliding(found)}" if found["window"] else ""
    lines = [
        f"{found['shape']}{window}, {found['dtype']} on {device['name']}{rank}",
        f"ceilings ({device['source']}): {device['product_flops_per_second'] / 1e12:,.4g} TFLOP/s of products, "
        f"{device['attention_flops_per_second'] / 1e12:,.4g} of attention, {device['bytes_per_second'] / 1e9:,.4g} "
        f"GB/s; ridge {device['ridge']:,.3g} FLOPs a byte",
        "A part takes its FLOPs at the one or its bytes at the other, whichever is longer; of prefill's attention the "
        "causal half is counted.",
    ]
    return "\n".join(fill(line, LINE) for line in lines)


def _sliding(found: Mapping[str, Any]) -> str:
    return f"blocks by {found['window_pattern']}" if found["window_pattern"] else "every block"


def _models(found: Mapping[str, Any]) -> str:
    columns = ["", "parameters", "weights\nGiB", "cache KiB\na token", "decode attention\nFLOPs a byte"]
    table = of_numbers(columns, (0,))
    for model in found["models"]:
        table.add_row(
            model["attention"],
            f"{model['parameters']:,}",
            f"{model['weight_bytes'] / GIB:,.2f}",
            f"{model['kv_cache_bytes_per_token'] / KIB:,.4g}",
            f"{_points(model, Phase.decode)[-1]['parts']['attention']['intensity']:.3g}",
        )
    return rendered(table, width=WIDTH)


def _crossings(found: Mapping[str, Any]) -> str:
    *others, fewest = [model["attention"] for model in found["models"]]
    columns = ["batch", *(f"{name}: cache\nover weights" for name in (*others, fewest))]
    table = of_numbers([*columns, *(f"{name}: {PARTED:g} x\nas long as {fewest}" for name in others)])
    for batch in map(str, found["batches"]):
        crossings = [model["crossings"] for model in found["models"]]
        table.add_row(
            batch,
            *(_context(one["cache_equals_weights"][batch]) for one in crossings),
            *(_context(one["parted"][batch]) for one in crossings[:-1]),
        )
    title = "decode: tokens of context from which a step reads more cache than weights, and from which models part"
    return f"{title}\n{rendered(table, width=WIDTH)}"


def _context(tokens: int | None) -> str:
    return "never" if tokens is None else f"{tokens:,}"


def _points(model: Mapping[str, Any], phase: Phase) -> list[dict[str, Any]]:
    return [point for point in model["points"] if point["phase"] == phase.value]


def _seconds(found: Mapping[str, Any], phase: Phase) -> str:
    """Render the times of a phase: by model, of the first over each, and the part of it that attention takes."""
    models = found["models"]
    names = [model["attention"] for model in models]
    columns = ["batch", "context", *(f"{name}\nms" for name in names)]
    columns += [f"{names[0]} over\n{name}" for name in names[1:]]
    table = of_numbers([*columns, *(f"{name}\nattention" for name in names)])
    for row in _rows(found, phase, table):
        table.add_row(
            str(row[0]["batch"]),
            f"{row[0]['context']:,}",
            *(_ms(point["seconds"]) + "*" * (point["fits"] is False) for point in row),
            *(f"{row[0]['seconds'] / point['seconds']:.2f}" for point in row[1:]),
            *(f"{point['parts']['attention']['seconds'] / point['seconds']:.0%}" for point in row),
        )
    title = "decode: a token of each sequence" if phase is Phase.decode else "prefill: all tokens of each sequence"
    if any(point["fits"] is False for model in models for point in model["points"]):
        title += "; *: as if it fitted the memory"
    return f"{title}\n{rendered(table, width=WIDTH)}"


def _measured_seconds(found: Mapping[str, Any], phase: Phase) -> str:
    """Render the times that were measured: by model, of the first over each, and over the roofline."""
    names = [model["attention"] for model in found["models"]]
    columns = ["batch", "context", *(f"{name}\nms" for name in names)]
    columns += [f"{names[0]} over\n{name}" for name in names[1:]]
    table = of_numbers([*columns, *(f"{name} over\nroofline" for name in names)])
    for row in _rows(found, phase, table):
        if "measured_seconds" in row[0]:
            table.add_row(
                str(row[0]["batch"]),
                f"{row[0]['context']:,}",
                *(_ms(point["measured_seconds"]) for point in row),
                *(f"{row[0]['measured_seconds'] / point['measured_seconds']:.2f}" for point in row[1:]),
                *(f"{point['measured_over_roofline']:.3g}" for point in row),
            )
    return f"{phase.value}, measured\n{rendered(table, width=WIDTH)}"


def _rows(found: Mapping[str, Any], phase: Phase, table: Table) -> Iterator[tuple[dict[str, Any], ...]]:
    """Yield the points of all models at each batch and context; a new batch is a new section of the table."""
    last = found["batches"][0]
    for row in zip(*(_points(model, phase) for model in found["models"]), strict=True):
        if row[0]["batch"] != last:
            table.add_section()
        last = row[0]["batch"]
        yield row


def _ms(seconds: float) -> str:
    return _number(1000 * seconds)


def _number(value: float) -> str:
    """Write a number with three digits, and without an exponent where it is large."""
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _bounds(found: Mapping[str, Any]) -> str:
    """Render intensities, and what bounds products and attention, at the shortest and the longest context."""
    names = [model["attention"] for model in found["models"]]
    columns = ["", "batch", "context", "products\nFLOPs a byte", *(f"{name} attention\nFLOPs a byte" for name in names)]
    table = of_numbers([*columns, *(f"{name} whole\nFLOPs a byte" for name in names)], (0,))
    ends = {found["contexts"][0], found["contexts"][-1]}
    for phase in (Phase.decode, Phase.prefill):
        for row in zip(*(_points(model, phase) for model in found["models"]), strict=True):
            if row[0]["context"] in ends:
                table.add_row(
                    phase.value,
                    str(row[0]["batch"]),
                    f"{row[0]['context']:,}",
                    _intensity(row[-1]["parts"]["products"]),
                    *(_intensity(point["parts"]["attention"]) for point in row),
                    *(_number(point["intensity"]) for point in row),
                )
    return f"arithmetic intensity, and what bounds it\n{rendered(table, width=WIDTH)}"


def _intensity(part: Mapping[str, Any]) -> str:
    return f"{_number(part['intensity'])} {part['bound']}"


def _fits(found: Mapping[str, Any]) -> str:
    names = [model["attention"] for model in found["models"]]
    columns = ["context", *(f"{name}\nbatch" for name in names), *(f"{name}\ntokens/s" for name in names)]
    room = found["device"]["memory_bytes"] / GIB
    table = of_numbers(columns)
    for row in zip(*(model["fits"] for model in found["models"]), strict=True):
        speeds = [fit["tokens_per_second"] for fit in row]
        table.add_row(
            f"{row[0]['context']:,}",
            *(f"{fit['batch']:,}" for fit in row),
            *("-" if speed is None else f"{speed:,.0f}" for speed in speeds),
        )
    title = f"the largest batch whose caches fit {room:,.1f} GiB beside the weights; activations are not counted"
    return f"{title}\n{rendered(table, width=WIDTH)}"


def conclusions(found: Mapping[str, Any]) -> list[str]:
    """Return what findings say by rule, a sentence or two each."""
    models, device = found["models"], found["device"]
    most, least = models[0], models[-1]
    decode, fast = _largest(found, Phase.decode)
    prefill, short = _largest(found, Phase.prefill)
    attention, products = decode["parts"]["attention"], decode["parts"]["products"]
    sizes = (attention["cache_bytes"], products["weight_bytes"], fast["parts"]["attention"]["cache_bytes"])
    cache, weights, less = (_number(size / GIB) for size in sizes)
    said = [
        f"Decoding, {_where(decode)}: in a step {most['attention']} reads and writes {cache} GiB of cache and reads "
        f"{weights} GiB of its blocks' weights. The cache is used at {attention['intensity']:.3g} FLOPs a byte, where "
        f"the ridge is {device['ridge']:,.3g}: {attention['bound']} bounds attention, and a larger batch changes "
        f"nothing of that. {least['attention']} moves {less} GiB of cache and is "
        f"{decode['seconds'] / fast['seconds']:.3g} times as fast.",
        f"Prefill, {_where(prefill)}: attention multiplies the same with any number of key/value heads, "
        f"{prefill['parts']['attention']['flops']:.3g} FLOPs; {least['attention']} is "
        f"{prefill['seconds'] / short['seconds']:.3g} times as fast as {most['attention']}, by its smaller projections "
        f"and by what it moves. {_quadratic(most)}",
    ]
    if found["tp"] > 1:
        alike = [model["attention"] for model in models if model["weight_bytes"] == least["weight_bytes"]]
        if len(alike) > 1:
            said.append(
                f"{' and '.join(alike)} are the same on a rank: {found['tp']} tensor-parallel ranks hold at least one "
                "key/value head each, so that fewer heads than ranks save nothing."
            )
    for model in models:
        if model["fits"][0]["batch"] == 0:
            said.append(
                f"{model['attention']} does not fit: weights and the cache of one sequence of "
                f"{model['fits'][0]['context']:,} tokens take more than {device['memory_bytes'] / GIB:,.1f} GiB; its "
                "times are what a larger memory of this speed would give, and a larger --tp would cut them."
            )
    return said + _measured(found)


def _largest(found: Mapping[str, Any], phase: Phase) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the point with most tokens of the first and of the last model, of those at which all fit if any do."""
    rows = list(zip(*(_points(model, phase) for model in found["models"]), strict=True))
    fitting = [row for row in rows if all(point["fits"] is not False for point in row)]
    row = max(fitting or rows, key=lambda row: row[0]["batch"] * row[0]["context"])
    return row[0], row[-1]


def _where(point: Mapping[str, Any]) -> str:
    return f"batch {point['batch']}, context {point['context']:,}"


def _quadratic(model: Mapping[str, Any]) -> str:
    tokens = model["crossings"]["attention_equals_products"]
    if tokens is None:
        return f"Up to {MOST_CONTEXT:,} tokens of context the matrices multiply more than attention does."
    return (
        f"From {tokens:,} tokens of context on attention multiplies more than the matrices, and grows with its square."
    )


def _measured(found: Mapping[str, Any]) -> list[str]:
    if "rounds" not in found:
        return []
    rounds = f"{found['rounds']} round{'s' * (found['rounds'] != 1)} by turns"
    said = []
    for phase in (Phase.decode, Phase.prefill):
        ratios = [point["measured_over_roofline"] for point in _timed(found, phase)]
        if ratios:
            said.append(
                f"Measured over roofline, {phase.value}: median {statistics.median(ratios):.3g}, from "
                f"{min(ratios):.3g} to {max(ratios):.3g}, {rounds}."
            )
    if said:
        said.append(
            "What it takes to start an operation is no part of a roofline, nor are the processor's caches, from which "
            "ratios below 1 come."
        )
    if left_out := found["left_out"]:
        said.append(f"Not measured, too long or too large for this machine: {_named(left_out)}.")
    return [*said, f"{found['load']:.1f} processes were running in the minute before."]


def _timed(found: Mapping[str, Any], phase: Phase) -> list[dict[str, Any]]:
    points = [point for model in found["models"] for point in _points(model, phase)]
    return [point for point in points if "measured_seconds" in point]


def _named(points: Sequence[Sequence[Any]]) -> str:
    return ", ".join(f"{phase} {batch} x {context:,}" for phase, batch, context in points)
