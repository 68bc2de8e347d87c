"""Local files to document texts. Whatever cannot be used is counted and costs no other document."""

import codecs
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from model.problems import BadInput
from train.data.tally import Tally

_READ = 1 << 20
# Decompressors lose the output of the call that fails, so they are fed little at a time.
_FEED = 1 << 10
_COMPRESSED = (".gz", ".zst")


class Damaged(Exception):
    """The rest of a file cannot be read."""


def kind_of(name: str) -> str:
    """Tell from its name how a file is read: `json` (a document per line), `parquet` (per row) or `text`."""
    lower = name.lower()
    for ending in _COMPRESSED:
        lower = lower.removesuffix(ending)
    if lower.endswith((".jsonl", ".json")):
        return "json"
    return "parquet" if lower.endswith(".parquet") else "text"


def is_compressed(name: str) -> bool:
    """Tell whether the bytes on disk are fewer than the text in the file (.gz, .zst, .parquet)."""
    return name.lower().endswith((*_COMPRESSED, ".parquet"))


def read_file(path: Path, name: str, text_field: str, separator: str | None, tally: Tally) -> Iterator[str]:
    """Stream the documents of one local file, in order.

    Args:
        path: the file.
        name: what to call it in `tally.places`.
        text_field: the field or column with the text, for JSONL and Parquet.
        separator: where to cut plain text into documents; None keeps the file whole.
        tally: counts what is read and skipped.

    Raises:
        BadInput: a Parquet file has no column `text_field`; all of it would be lost.
    """
    kind = kind_of(name)
    before, size = tally.bytes_read, path.stat().st_size if path.exists() else 0
    if kind == "json":
        yield from _json_documents(path, name, text_field, tally)
    elif kind == "parquet":
        yield from _parquet_documents(path, name, text_field, tally)
    else:
        yield from _text_documents(path, name, separator, tally)
    tally.bytes_read = before + size


def usable(text: Any, place: str, tally: Tally) -> TypeGuard[str]:
    """Count a decoded document in `tally` and say whether it is a string that can be trained on."""
    if not isinstance(text, str):
        tally.skip("no_text", place)
    elif not text or text.isspace():
        tally.skip("empty", place)
    elif not _has_utf8(text):
        tally.skip("bad_utf8", place)
    else:
        tally.documents += 1
        return True
    return False


def _has_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _json_documents(path: Path, name: str, text_field: str, tally: Tally) -> Iterator[str]:
    for number, raw, whole in _records(path, name, b"\n", tally):
        place = f"{name}:{number}"
        # The last line of a damaged file is half a line: the damage is counted already. Blank lines are no documents.
        if not whole or not raw.strip():
            continue
        try:
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError:
            tally.skip("bad_utf8", place)
            continue
        except (ValueError, RecursionError):
            tally.skip("bad_json", place)
            continue
        text = row.get(text_field) if isinstance(row, dict) else None
        if usable(text, place, tally):
            yield text


def _text_documents(path: Path, name: str, separator: str | None, tally: Tally) -> Iterator[str]:
    cut = separator.encode("utf-8") if separator else None
    line = 1
    for _, raw, whole in _records(path, name, cut, tally):
        place = f"{name}:{line}" if cut else name
        if cut:
            line += raw.count(b"\n") + cut.count(b"\n")
        try:
            # A file that breaks off may do so in the middle of a character, which is no fault of its text.
            text = raw.decode("utf-8") if whole else codecs.getincrementaldecoder("utf-8")().decode(raw)
        except UnicodeDecodeError:
            tally.skip("bad_utf8", place)
            continue
        if usable(text, place, tally):
            yield text


def _parquet_documents(path: Path, name: str, text_field: str, tally: Tally) -> Iterator[str]:
    import glob

    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import load_dataset

    try:
        columns = pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        tally.skip("unreadable", name)
        return
    if text_field not in columns:
        raise BadInput(
            [f"data.text_field={text_field}: {path} has no such column; one of its columns would work: "
             f"{', '.join(columns)}"]
        )  # fmt: skip
    row = 0
    try:
        # File by file, so that a damaged one does not end the stream. As Arrow tables, because Arrow hands out a
        # string column without checking it: as bytes, one bad row costs itself and not its batch.
        rows = load_dataset(
            "parquet", data_files=[glob.escape(str(path))], split="train", streaming=True, columns=[text_field]
        )
        for table in rows.with_format("arrow").iter(batch_size=256):
            column = table.column(text_field)
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                column = column.cast(pa.large_binary())
            for scalar in column:
                row += 1
                value = scalar.as_py()
                if isinstance(value, bytes):
                    try:
                        value = value.decode("utf-8")
                    except UnicodeDecodeError:
                        tally.skip("bad_utf8", f"{name}:{row}")
                        continue
                if usable(value, f"{name}:{row}", tally):
                    yield value
    except (OSError, pa.ArrowException):
        tally.skip("unreadable", f"{name}:{row + 1}")


def _records(path: Path, name: str, separator: bytes | None, tally: Tally) -> Iterator[tuple[int, bytes, bool]]:
    """Cut a file at `separator`: (number from 1, bytes without the separator, whether it is whole)."""
    held, start, scanned, number = bytearray(), 0, 0, 1
    whole = True
    try:
        for block in _blocks(path, tally):
            if number == 1 and not held:
                block = block.removeprefix(codecs.BOM_UTF8)
            held += block
            while separator and (at := held.find(separator, scanned)) >= 0:
                yield number, bytes(held[start:at]), True
                number += 1
                start = scanned = at + len(separator)
            if separator:
                # The next block may complete a separator that this one began.
                del held[:start]
                start, scanned = 0, max(0, len(held) - len(separator) + 1)
    except Damaged:
        tally.skip("unreadable", name)
        whole = False
    # Blank space after the last separator, or before the damage, is no document; a blank file is an empty one.
    if (held and not held.isspace()) or (whole and number == 1):
        last = bytes(held)
        held.clear()  # the record may be a file of gigabytes
        yield number, last, whole


def _blocks(path: Path, tally: Tally) -> Iterator[bytes]:
    """The uncompressed content in blocks of about a mebibyte.

    Raises:
        Damaged: after everything that could be read.
    """
    name = path.name.lower()
    try:
        with open(path, "rb") as file:
            if name.endswith(_COMPRESSED):
                yield from _decompress(file, name.endswith(".zst"), tally)
                return
            while block := file.read(_READ):
                tally.bytes_read += len(block)
                yield block
    except OSError as error:
        raise Damaged from error


def _decompress(file: Any, zstd: bool, tally: Tally) -> Iterator[bytes]:
    """The content of a .gz or .zst of one or more members, and `Damaged` where it breaks off or goes wrong.

    Not through `gzip.open` and zstandard's reader: the latter ends in silence where a file is cut short.
    """
    import zstandard

    def member() -> Any:
        # 2 GiB is the largest window that `zstd --long` writes; the default would refuse such files.
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj() if zstd else zlib.decompressobj(31)

    stream, begun = member(), False
    held = bytearray()
    while block := file.read(_READ):
        tally.bytes_read += len(block)
        for at in range(0, len(block), _FEED):
            rest = block[at : at + _FEED]
            while rest:
                # gzip allows zeros after a member, and some tape-minded tools write them.
                if not begun and not zstd and not rest.strip(b"\0"):
                    break
                try:
                    held += stream.decompress(rest)
                except (zlib.error, zstandard.ZstdError) as error:
                    yield bytes(held)
                    raise Damaged from error
                begun = not stream.eof
                rest = b""
                if stream.eof:
                    rest = stream.unused_data
                    stream = member()
            if len(held) >= _READ:
                yield bytes(held)
                held.clear()
    yield bytes(held)
    if begun:
        raise Damaged
