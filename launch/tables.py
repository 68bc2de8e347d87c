"""Tables as plain text, for a terminal, a pipe or a file alike."""

from collections.abc import Collection, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table

WIDTH = 118


def rendered(*parts: RenderableType, width: int = WIDTH) -> str:
    """Render tables and lines as plain text without spaces at the ends of lines.

    Args:
        parts: what is rendered, one below the other.
        width: the most characters of a line.
    """
    console = Console(width=width, highlight=False, color_system=None)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def of_numbers(columns: Sequence[str], texts: Collection[str | int] = (), title: str | None = None) -> Table:
    """Make a table without frames whose columns are numbers, which no line breaks.

    Args:
        columns: their headings.
        texts: the headings or the indices of those that are text.
        title: above it.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if {index, name} & set(texts) else "right", no_wrap=True)
    return table
