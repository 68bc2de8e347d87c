"""Files to document texts. Whatever cannot be used is counted and costs no other document."""

import codecs
import json
import zlib
from collections.abc import Iterator
from typing import Any, TypeGuard

from train.data.columns import CorpusPath, kind_of_table, table_documents
from train.data.tally import Tally

_READ = 1 << 20
# Decompressors lose the output of the call that fails, so they are fed little at a time.
_FEED = 1 << 10
_COMPRESSED = (".gz", ".zst")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# Integers as floats: Python refuses to read one of 5,000 digits, in whatever field.
_JSON = json.JSONDecoder(parse_int=float)
_BETWEEN = " \t\r\n\ufeff"


class Damaged(Exception):
    """The rest of a file cannot be read."""


def kind_of(name: str) -> str:
    """Tell from its name how a file is read: `json` (a document per line), `table` (per row) or `text`."""
    lower = name.lower()
    for ending in _COMPRESSED:
        lower = lower.removesuffix(ending)
    if lower.endswith((".jsonl", ".json", ".ndjson", ".jsonlines")):
        return "json"
    return "table" if kind_of_table(lower) else "text"


def read_file(
    path: CorpusPath,
    name: str,
    text_field: str,
    separator: str | None,
    tally: Tally,
    span: tuple[int, int] | None = None,
) -> Iterator[str]:
    """Stream the documents of one file, or of a part of it, in order.

    The parts of a file that spans without gaps between them give have all its documents, each once: those of lines and
    of texts begin after the first separator from the beginning of the span on, those of tables are the row groups
    whose first byte lies in it.

    Args:
        path: the file.
        name: what to call it in `tally.places`.
        text_field: the field or column with the text, for JSONL and tables; `check_columns` has found it there.
        separator: where to cut plain text into documents; None keeps the file whole.
        tally: counts what is read and skipped. Of a span that does not begin the file, lines are counted from 1.
        span: from and to which byte; None for the whole file, which only files that `can_be_cut` need not be.
    """
    kind = kind_of(name)
    before, size = tally.bytes_read, path.stat().st_size if path.exists() else 0
    if span is not None:
        size = span[1] - span[0]
    if kind == "json":
        yield from _json_documents(path, name, text_field, tally, span)
    elif kind == "table":
        for value, place in table_documents(path, name, text_field, tally, span):
            if usable(value, place, tally):
                yield value
    else:
        yield from _text_documents(path, name, separator, tally, span)
    if span is None or kind == "table":
        tally.bytes_lost += before + size - tally.bytes_read
    tally.bytes_read = before + size


def can_be_cut(path: CorpusPath, name: str, separator: str | None) -> bool:
    """Tell whether `read_file` can read a file in parts: lines and separated text that are not compressed, Parquet."""
    kind = kind_of(name)
    if kind == "table":
        return kind_of_table(name) == "parquet"
    if kind == "text" and separator is None:
        return False
    try:
        with path.open("rb") as file:
            begins = file.read(len(_ZSTD))
    except OSError:
        return False
    return not (begins == _ZSTD or begins[: len(_GZIP)] == _GZIP or name.lower().endswith(_COMPRESSED))


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


def _json_documents(
    path: CorpusPath, name: str, text_field: str, tally: Tally, span: tuple[int, int] | None
) -> Iterator[str]:
    found, damaged, number = False, tally.unreadable, 0
    for number, raw, whole in _records(path, name, b"\n", tally, span):
        place = f"{name}:{number}"
        # The last line of a damaged file is half a line: the damage is counted already. Blank lines are no documents.
        if not whole or not raw.strip():
            continue
        found = True
        # What is no UTF-8 in another field harms nobody; in the text it leaves half a surrogate pair, which is found.
        line = raw.decode("utf-8", "surrogateescape")
        try:
            rows = _json_values(line)
        except (ValueError, RecursionError):
            tally.skip("bad_json" if _has_utf8(line) else "bad_utf8", place)
            continue
        for row in rows:
            text = row.get(text_field) if isinstance(row, dict) else None
            if usable(text, place, tally):
                yield text
    if span is not None:
        tally.lines += number  # whether any part of the file has a row is known where they are put together
    elif not found and tally.unreadable == damaged:
        tally.skip("no_rows", name)


def _json_values(line: str) -> list[Any]:
    """The values of a line: one, but where files without a last newline were joined.

    Raises:
        ValueError: it is not JSON.
    """
    values, rest = [], line.strip(_BETWEEN)
    while rest:
        value, end = _JSON.raw_decode(rest)
        values.append(value)
        rest = rest[end:].lstrip(_BETWEEN)
    return values


def _text_documents(
    path: CorpusPath, name: str, separator: str | None, tally: Tally, span: tuple[int, int] | None
) -> Iterator[str]:
    cut = separator.encode("utf-8") if separator else None
    line = 1
    for _, raw, whole in _records(path, name, cut, tally, span):
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
    if span is not None:
        tally.lines += line - 1


def _records(
    path: CorpusPath, name: str, separator: bytes | None, tally: Tally, span: tuple[int, int] | None
) -> Iterator[tuple[int, bytes, bool]]:
    """Cut a file at `separator`: (number from 1, bytes without the separator, whether it is whole)."""
    held, start, scanned, number = bytearray(), 0, 0, 1
    whole = True
    try:
        for block in _blocks(path, tally) if span is None else _part(path, tally, separator or b"", span):
            held += block
            while separator and (at := held.find(separator, scanned)) >= 0:
                yield number, _without_bom(held[start:at]), True
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
    if (held and not held.isspace()) or (whole and number == 1 and span is None):
        last = _without_bom(held)
        held.clear()  # the record may be a file of gigabytes
        yield number, last, whole


def _without_bom(record: bytearray) -> bytes:
    """A record without the mark that stands where a file begins, and so within files that were joined."""
    return bytes(record.removeprefix(codecs.BOM_UTF8))


def _part(path: CorpusPath, tally: Tally, separator: bytes, span: tuple[int, int]) -> Iterator[bytes]:
    """The records that begin in a span, in blocks.

    Raises:
        Damaged: after everything that could be read.
    """
    try:
        with path.open("rb") as file:
            start = _record_start(file, separator, span[0], span[1])
            if start is None:
                return
            end = _record_start(file, separator, span[1], None)
            file.seek(start)
            left = path.stat().st_size - start if end is None else end - start
            while left and (block := file.read(min(_READ, left))):
                left -= len(block)
                yield block
            tally.bytes_lost += left
    except OSError as error:
        raise Damaged from error


def _record_start(file: Any, separator: bytes, at: int, limit: int | None) -> int | None:
    """Where the first record begins that a separator from byte `at` (and before `limit`) on ends in front of.

    A separator that overlaps itself, such as two newlines among three, is taken only where none begins within the one
    before it: there, reading from the beginning of the file takes it as well.
    """
    if at == 0:
        return 0
    base = max(0, at - len(separator) + 1)
    file.seek(base)
    held, last = b"", -len(separator)
    while block := file.read(_READ):
        held += block
        found = held.find(separator)
        while found >= 0:
            position = base + found
            if limit is not None and position >= limit:
                return None
            if position >= at and position - last >= len(separator):
                return position + len(separator)
            last = position
            found = held.find(separator, found + 1)
        kept = min(len(separator) - 1, len(held))
        base, held = base + len(held) - kept, held[len(held) - kept :]
        if limit is not None and base >= limit:
            return None
    return None


def _blocks(path: CorpusPath, tally: Tally) -> Iterator[bytes]:
    """The uncompressed content in blocks of about a mebibyte.

    Raises:
        Damaged: after everything that could be read.
    """
    name = path.name.lower()
    try:
        with path.open("rb") as file:
            begins = file.read(len(_ZSTD))
            file.seek(0)
            # By what is in it as well: no text begins so, and not everybody who compresses renames.
            zstd = begins == _ZSTD or name.endswith(".zst")
            if zstd or begins[: len(_GZIP)] == _GZIP or name.endswith(_COMPRESSED):
                yield from _decompress(file, zstd, tally)
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
