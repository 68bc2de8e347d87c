"""Figures of metrics.jsonl as arrays, read by pyarrow in chunks: a million records in seconds."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Figure = tuple[str, ...]
"""A single figure of a record: its key and, where that has parts, the names or indices on the way to it, such as
``("val_sets", "web", "loss")`` or ``("wait_seconds", "0")``."""
Columns = dict[Figure, NDArray[np.float64]]
"""Figures of several records, an array of one length for each; NaN where a record has none or it was not finite."""
_BYTES = 2**24


def chunks(path: Path, names: Sequence[str] | None = None) -> Iterator[tuple[Columns, int]]:
    """Yield the figures of a file of records, some ten thousand records at a time.

    Args:
        path: of the file; one that cannot be read has no records. A last line that is not ended yet is none.
        names: the figures to read, which have no parts; None for all.

    Yields:
        Columns, of which a figure that none of the records has is missing unless it was asked for; and the number of
        lines that are no records.
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


def _chunk(lines: bytes, names: Sequence[str] | None) -> tuple[Columns, int]:
    """Parse whole lines; where pyarrow cannot, those that are objects are parsed one by one."""
    import pyarrow as pa

    count = lines.count(b"\n")
    if not lines.startswith(b"{") or lines.count(b"\n{") != count - 1 or lines.count(b"}\n") != count:
        return _one_by_one(lines, names)  # pyarrow takes null for a record, and a chunk of that alone ends the process
    columns: Columns = {}
    try:
        table = _table(lines, names)
        for name in table.column_names:
            _add(columns, (name,), table.column(name).combine_chunks())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, UnicodeDecodeError):
        return _one_by_one(lines, names)
    return columns, 0


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
            part = compute.list_slice(values, index, index + 1, return_fixed_size_list=True)
            inner: Columns = {}
            _add(inner, (*figure, str(index)), part.drop_null().flatten())
            there = part.is_valid().to_numpy(zero_copy_only=False)
            for name, some in inner.items():
                found[name] = np.full(len(values), np.nan)
                found[name][there] = some
    elif pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind):
        numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
        found[figure] = np.where(np.isfinite(numbers), numbers, np.nan)  # pyarrow reads Infinity as a number


def _one_by_one(lines: bytes, names: Sequence[str] | None) -> tuple[Columns, int]:
    """Parse lines of which some are no records, or whose figures are of no one form."""
    objects: list[dict[str, Any]] = []
    given = lines.splitlines()
    for line in given:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            objects.append(record)
    found: Columns = {} if names is None else {(name,): np.full(len(objects), np.nan) for name in names}
    for row, record in enumerate(objects):
        for figure, value in _leaves(record, ()):
            if names is None or figure in found:
                found.setdefault(figure, np.full(len(objects), np.nan))[row] = value
    return found, len(given) - len(objects)


def _leaves(value: Any, way: Figure) -> Iterator[tuple[Figure, float]]:
    if isinstance(value, dict | list):
        for part, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, (*way, str(part)))
    elif isinstance(value, bool | int | float) or (value is None and way):
        yield way, _finite(value)


def _finite(value: bool | int | float | None) -> float:
    """Return a number, NaN for one that is not finite or that no float holds."""
    try:
        return float(value) if value is not None and math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan
