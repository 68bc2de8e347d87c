"""Units of work that a corpus is cut into: each is tokenised into a shard of its own, by whichever process takes it.

They follow from the files alone, their names and sizes, and not from who works on them; put together in their order
they have the documents of the corpus in its order, each once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from conf.train_settings import DataConfig, Source
from train.data import corpus
from train.data.columns import CorpusPath
from train.data.readers import can_be_cut, read_file
from train.data.tally import Tally

SMALLEST, LARGEST, MANY = 1 << 22, 1 << 30, 1 << 12
"""Bytes of a unit: of a small corpus, and at most; and the number of units at which they begin to grow. A unit is
minutes of one core, and ten terabytes are ten thousand."""


@dataclass(frozen=True)
class Part:
    """A file of a unit, or a span of one."""

    name: str
    path: CorpusPath | None
    """None for a dataset of the hub, which is streamed as a whole."""
    size: int
    """Bytes that are read, as they lie on disk; 0 for the hub."""
    span: tuple[int, int] | None = None
    """From and to which byte; None for a whole file."""


Unit = tuple[Part, ...]
"""Whole files, or one span of a file."""


def units_of(data: DataConfig) -> list[Unit]:
    """Cut a corpus into units, in the order of its documents."""
    if data.source is Source.hub:
        return [(Part(str(data.name), None, 0),)]
    files = [(name, path, path.stat().st_size) for name, path in corpus.list_files(data)]
    wanted = min(max(SMALLEST, -(-sum(size for _, _, size in files) // MANY)), LARGEST)
    separator = corpus.separator_of(data)
    units: list[Unit] = []
    held: list[Part] = []

    def close() -> None:
        if held:
            units.append(tuple(held))
            held.clear()

    for name, path, size in files:
        if size > wanted * 3 // 2 and can_be_cut(path, name, separator):
            close()
            pieces = -(-size // wanted)
            for piece in range(pieces):
                span = (size * piece // pieces, size * (piece + 1) // pieces)
                units.append((Part(name, path, span[1] - span[0], span),))
            continue
        if held and sum(part.size for part in held) + size > wanted:
            close()
        held.append(Part(name, path, size))
    close()
    return units


def documents_of(data: DataConfig, unit: Sequence[Part], tally: Tally) -> Iterator[str]:
    """Stream the texts of a unit's usable documents, in the same order every time.

    Args:
        data: the corpus.
        unit: what to read of it.
        tally: counts what is read and skipped.

    Raises:
        BadInput: the hub dataset cannot be opened, or has no such column as `data.text_field`.
    """
    separator = corpus.separator_of(data)
    for part in unit:
        if part.path is None:
            yield from corpus.hub_documents(data, tally)
        else:
            yield from read_file(part.path, part.name, data.text_field, separator, tally, part.span)


def joined(units: Sequence[Unit], tallies: Sequence[Tally]) -> Tally:
    """Put together what the passes over all units have met: as one pass over the corpus would have."""
    whole = Tally()
    file, lines, records, damaged = "", 0, 0, 0

    def end_of_file() -> None:
        if file and not records and not damaged:
            whole.skip("no_rows", file)

    for unit, tally in zip(units, tallies, strict=True):
        part = unit[0]
        if part.span is None or part.span[0] == 0:
            end_of_file()
            file, lines, records, damaged = "", 0, 0, 0
        if part.span is None:
            whole.add(tally)
            continue
        file = part.name
        whole.add(tally, lines)
        lines, records, damaged = lines + tally.lines, records + tally.records, damaged + tally.unreadable
    end_of_file()
    return whole
