"""Figures of metrics.jsonl as arrays, read by pyarrow in chunks: a million records in seconds."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.strict_json import NONFINITE

Figure = tuple[str, ...]
"""A single figure of a record: its key and, where that has parts, the names or indices on the way to it, such as
``("val_sets", "web", "loss")`` or ``("wait_seconds", "0")``."""
Columns = dict[Figure, NDArray[np.float64]]
"""Figures of several records, an array of one length for each; NaN where a record has none or it was not finite."""
_BYTES = 2**24


@dataclass(frozen=True)
class Chunk:
    """Some records.

    Attributes:
        columns: their figures; one that none of them has is missing, unless it was asked for.
        nonfinite: how often each figure was not finite, by its name as records have it: ``wait_seconds.1``.
        torn: how many lines are no records.
    """

    columns: Columns
    nonfinite: Counter[str] = field(default_factory=Counter)
    torn: int = 0


@dataclass(frozen=True)
class Curve:
    """A figure over a run, thinned to what a picture can show: of each bucket of steps the lowest and the highest.

    Attributes:
        step, tokens, hours, value: of the points, each a figure that was recorded, in the order of the steps. Hours are
            those of its steps, without validations, saves and restarts.
        mean_step, mean_tokens, mean_hours, mean: the means over each bucket.
        nonfinite: in how many records it was not finite; they have no point.
    """

    step: NDArray[np.float64]
    tokens: NDArray[np.float64]
    hours: NDArray[np.float64]
    value: NDArray[np.float64]
    mean_step: NDArray[np.float64]
    mean_tokens: NDArray[np.float64]
    mean_hours: NDArray[np.float64]
    mean: NDArray[np.float64]
    nonfinite: int = 0


def chunks(path: Path, names: Sequence[str] | None = None) -> Iterator[Chunk]:
    """Yield the records of a file, some ten thousand at a time.

    Args:
        path: of the file; one that cannot be read has no records. A last line that is not ended yet is none.
        names: the figures to read, which have no parts; None for all.
    """
    rest = b""
    try:
        with open(path, "rb", buffering=0) as file:
            while part := file.read(_BYTES):
                whole, newline, after = part.rpartition(b"\n")
                if newline:
                    yield _chunk(rest + whole + b"\n", names)
                    rest = after
                else:
                    rest += part
    except OSError:
        return


def _chunk(lines: bytes, names: Sequence[str] | None) -> Chunk:
    """Parse whole lines; where pyarrow cannot, those that are objects are parsed one by one."""
    import pyarrow as pa
    from pyarrow import compute

    try:
        table = _table(lines, names)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        return _one_by_one(lines, names)
    columns: Columns = {}
    for name in table.column_names:
        if name != NONFINITE:
            _add(columns, (name,), table.column(name).combine_chunks())
    flagged = (
        compute.value_counts(compute.list_flatten(table.column(NONFINITE).combine_chunks()))
        if NONFINITE in table.column_names
        else []
    )
    return Chunk(columns, Counter({one["values"].as_py(): one["counts"].as_py() for one in flagged}))


def _table(lines: bytes, names: Sequence[str] | None) -> Any:
    import pyarrow as pa
    from pyarrow import json as reader

    asked = pa.schema([(name, pa.float64()) for name in names]) if names is not None else None
    return reader.read_json(
        pa.py_buffer(lines),
        read_options=reader.ReadOptions(block_size=2 * len(lines), use_threads=False),
        parse_options=reader.ParseOptions(
            explicit_schema=asked, unexpected_field_behavior="infer" if asked is None else "ignore"
        ),
    )


def _add(found: Columns, figure: Figure, values: Any) -> None:
    """Add the figures of a column of a table, and of its parts."""
    import pyarrow as pa
    from pyarrow import compute

    kind = values.type
    if pa.types.is_struct(kind):
        for index in range(kind.num_fields):
            _add(found, (*figure, kind.field(index).name), compute.struct_field(values, index))
    elif pa.types.is_list(kind):
        longest = compute.max(compute.list_value_length(values)).as_py() or 0
        for index in range(longest):
            shorter = compute.list_slice(values, index, index + 1, return_fixed_size_list=True)
            part = shorter.flatten() if not shorter.null_count else _element(values, index)
            _add(found, (*figure, str(index)), part)
    elif pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind):
        found[figure] = values.cast(pa.float64()).to_numpy(zero_copy_only=False)


def _element(values: Any, index: int) -> Any:
    """Take an element of each list, null where there is none."""
    import pyarrow as pa

    return pa.array([row[index] if row is not None and index < len(row) else None for row in values.to_pylist()])


def _one_by_one(lines: bytes, names: Sequence[str] | None) -> Chunk:
    """Parse lines of which some are no records, or whose figures are of no one form."""
    objects: list[dict[str, Any]] = []
    nonfinite: Counter[str] = Counter()
    given = lines.splitlines()
    for line in given:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            flagged = record.pop(NONFINITE, [])
            nonfinite.update(name for name in flagged if isinstance(name, str))
            objects.append(record)
    found: Columns = {} if names is None else {(name,): np.full(len(objects), np.nan) for name in names}
    for row, record in enumerate(objects):
        for figure, value in _leaves(record, ()):
            if names is None or figure in found:
                found.setdefault(figure, np.full(len(objects), np.nan))[row] = value
    return Chunk(found, nonfinite, len(given) - len(objects))


def _leaves(value: Any, way: Figure) -> Iterator[tuple[Figure, float]]:
    if isinstance(value, dict | list):
        for part, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, (*way, str(part)))
    elif isinstance(value, bool | int | float) or (value is None and way):
        yield way, float("nan") if value is None else float(value)


def thinned(read: Iterable[Chunk], first_step: float, last_step: float, buckets: int = 1000) -> dict[Figure, Curve]:
    """Thin all figures of a run to curves of at most about two points for each bucket of steps, spikes included.

    Args:
        read: its records.
        first_step, last_step: of the run so far.
        buckets: into which its steps are divided; where it has no more steps, all points stay.
    """
    pieces: dict[Figure, list[list[NDArray[np.float64]]]] = {}
    nonfinite: Counter[str] = Counter()
    elapsed, width = 0.0, max(1.0, (last_step - first_step + 1) / buckets)
    for chunk in read:
        nonfinite += chunk.nonfinite
        step = chunk.columns.get(("step",), np.empty(0))
        none = np.full(len(step), np.nan)
        seconds = np.nan_to_num(chunk.columns.get(("seconds",), none))
        x = (step, chunk.columns.get(("tokens",), none), (elapsed + np.cumsum(seconds)) / 3600)
        elapsed += float(seconds.sum())
        bucket = np.floor((step - first_step) / width)
        for figure, values in chunk.columns.items():
            there = np.isfinite(values) & np.isfinite(bucket) if len(step) else np.zeros(len(values), bool)
            if there.any():
                pieces.setdefault(figure, []).append(_extremes(bucket[there], values[there], [one[there] for one in x]))
    return {
        figure: Curve(*(np.concatenate(parts) for parts in zip(*found, strict=True)), nonfinite[".".join(figure)])
        for figure, found in pieces.items()
    }


def _extremes(
    bucket: NDArray[np.float64], values: NDArray[np.float64], x: Sequence[NDArray[np.float64]]
) -> list[NDArray[np.float64]]:
    """Return of each bucket the points with its lowest and highest value, and its means: the arrays of a `Curve`."""
    order = np.lexsort((values, bucket))
    starts = np.flatnonzero(np.diff(bucket[order], prepend=-np.inf))
    ends = np.append(starts[1:], len(order)) - 1
    kept = np.unique(np.concatenate([order[starts], order[ends]]))
    counts = ends - starts + 1

    def mean(of: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.add.reduceat(of[order], starts) / counts)

    return [*(one[kept] for one in x), values[kept], *(mean(one) for one in x), mean(values)]
