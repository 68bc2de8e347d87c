"""Columns of tables on disk: Parquet and Arrow files, and the folders that `datasets.save_to_disk` writes."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.data.formats.remote import RemotePath
from train.data.tally import Tally

if TYPE_CHECKING:
    import pyarrow as pa

CorpusPath = Path | RemotePath
"""A file of a corpus; both have name, stat, exists and open."""

_BATCH = 256
_MAX_NAMED = 3
_STATE, _INFO, _DICT = "state.json", "dataset_info.json", "dataset_dict.json"


def kind_of_table(name: str) -> str | None:
    """Tell from its name whether a file is a table: `parquet`, `arrow`, or None."""
    lower = name.lower()
    if lower.endswith((".parquet", ".parq", ".pq")):
        return "parquet"
    return "arrow" if lower.endswith((".arrow", ".feather")) else None


def saved_dataset(folder: Path) -> list[Path] | None:
    """List the files of a folder that `Dataset.save_to_disk` has written, in their order; None if it is no such."""
    try:
        entries = json.loads((folder / _STATE).read_text("utf-8"))["_data_files"]
        files = [folder / entry["filename"] for entry in entries]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return files if (folder / _INFO).is_file() else None


def saved_splits(folder: Path) -> list[str]:
    """Name the splits of a folder that `DatasetDict.save_to_disk` has written; none if it is no such."""
    try:
        splits = json.loads((folder / _DICT).read_text("utf-8"))["splits"]
        return [str(split) for split in splits]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def check_columns(files: Sequence[tuple[str, CorpusPath]], text_field: str) -> list[str]:
    """Find tables without a text column, by their schemas alone; those that cannot be read are left to the reader."""
    tables = [(name, path) for name, path in files if kind_of_table(name)]
    if not tables:
        return []
    with ThreadPoolExecutor(16) as threads:
        schemas = list(threads.map(lambda file: _schema(file[1]), tables))
    lacking: list[str] = []
    other: list[str] = []
    columns: list[str] = []
    types: set[str] = set()
    for (_, path), schema in zip(tables, schemas, strict=True):
        if schema is None:
            continue
        if text_field not in schema.names:
            lacking.append(str(path))
            columns = columns or schema.names
        elif not _holds_text(kind := schema.field(text_field).type):
            other.append(str(path))
            types.add(str(kind))
    problems = []
    if lacking:
        problems.append(f"data.text_field={text_field}: {_few(lacking)} has no such column ({len(lacking)} of "
                        f"{len(tables)} files); one of its columns would work: {', '.join(columns)}")  # fmt: skip
    if other:
        problems.append(f"data.text_field={text_field}: in {_few(other)} that column is {', '.join(sorted(types))} "
                        f"({len(other)} of {len(tables)} files); a column of strings would work")  # fmt: skip
    return problems


def table_documents(
    path: CorpusPath, name: str, text_field: str, tally: Tally, span: tuple[int, int] | None = None
) -> Iterator[tuple[object, str]]:
    """Stream a column's values, strings decoded; what is not UTF-8 is counted and left out.

    Args:
        path: the file.
        name: what to call it.
        text_field: the column.
        tally: counts what is read and skipped.
        span: of a Parquet file, the bytes in which the row groups begin that are read; None for all of any file.

    Yields:
        A value and its place, as `file:row`.
    """
    import pyarrow as pa

    row, begin, size = 0, tally.bytes_read, path.stat().st_size if path.exists() else 0
    if span is not None:
        size = span[1] - span[0]
    try:
        table = _parquet(path, text_field, span) if kind_of_table(path.name) == "parquet" else _arrow(path, text_field)
        for column, share, first_row in table:
            row = max(row, first_row)
            for value in _as_bytes(column):
                row += 1
                place = f"{name}:{row}"
                if isinstance(value, bytes):
                    try:
                        value = value.decode("utf-8")
                    except UnicodeDecodeError:
                        tally.skip("bad_utf8", place)
                        continue
                yield value, place
            tally.bytes_read = begin + int(size * share)
    except (OSError, ValueError, pa.ArrowException):
        tally.skip("unreadable", f"{name}:{row + 1}" if row else name)
        return
    tally.bytes_read = begin + size
    if not row and span is None:
        tally.skip("no_rows", name)


def _parquet(
    path: CorpusPath, text_field: str, span: tuple[int, int] | None
) -> Iterator[tuple["pa.Array", float, int]]:
    """The column in batches, each with the share of what is read that ends with it, and the rows before what is read.

    Not through `datasets`, which reads the description of all features that other versions of it have left there.
    """
    import pyarrow.parquet as pq

    done = 0
    with _source(path) as source, pq.ParquetFile(source) as file:
        groups = range(file.metadata.num_row_groups)
        if span is not None:
            groups = range(*(sum(_begins(file.metadata, g) < byte for g in groups) for byte in span))
        before = sum(file.metadata.row_group(g).num_rows for g in range(groups.start))
        rows = sum(file.metadata.row_group(g).num_rows for g in groups)
        for batch in file.iter_batches(_BATCH, row_groups=list(groups), columns=[text_field]) if groups else ():
            done += batch.num_rows
            yield batch.column(text_field), done / rows, before


def _begins(metadata: Any, group: int) -> int:
    """The byte at which a row group begins; files ascend in it."""
    column = metadata.row_group(group).column(0)
    first: int = column.data_page_offset
    return min(first, column.dictionary_page_offset or first)


def _arrow(path: CorpusPath, text_field: str) -> Iterator[tuple["pa.Array", float, int]]:
    import pyarrow as pa

    wanted = pa.ipc.IpcReadOptions(included_fields=[_arrow_schema(path).names.index(text_field)])
    with _source(path) as source:
        if _is_arrow_file(path):
            reader = pa.ipc.open_file(source, options=wanted)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number).column(text_field), (number + 1) / reader.num_record_batches, 0
        else:
            for batch in pa.ipc.open_stream(source, options=wanted):
                yield batch.column(text_field), source.tell() / source.size(), 0


def _source(path: CorpusPath) -> "pa.NativeFile":
    import pyarrow as pa

    return pa.OSFile(str(path)) if isinstance(path, Path) else pa.PythonFile(path.open("rb"), mode="r")


def _arrow_schema(path: CorpusPath) -> "pa.Schema":
    import pyarrow as pa

    with _source(path) as source:
        return (pa.ipc.open_file if _is_arrow_file(path) else pa.ipc.open_stream)(source).schema


def _is_arrow_file(path: CorpusPath) -> bool:
    """Whether it is Arrow's format for files; `datasets` writes the one for streams."""
    with path.open("rb") as file:
        return file.read(6) == b"ARROW1"


def _schema(path: CorpusPath) -> "pa.Schema | None":
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind_of_table(path.name) == "arrow":
            return _arrow_schema(path)
        with _source(path) as source:
            return pq.read_schema(source)
    except (OSError, pa.ArrowException):
        return None


def _holds_text(kind: "pa.DataType") -> bool:
    """Whether values of a type can be text; a column of nothing but nulls is one without text."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(holds(kind) for holds in (*strings, *binary, pa.types.is_null))


def _as_bytes(column: "pa.Array") -> list[object]:
    """A column's values; strings as bytes, because Arrow checks them no sooner than when one is made, and then all."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        entries = _as_bytes(column.dictionary)
        return [None if at is None else entries[at] for at in column.indices.to_pylist()]
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    elif pa.types.is_string_view(column.type):
        column = column.cast(pa.binary_view())
    values: list[object] = column.to_pylist()
    return values


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
