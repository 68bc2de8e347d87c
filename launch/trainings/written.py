"""What a study says and leaves: its progress on stderr, its numbers, a text of them, and pictures."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.strict_json import dumps


def write_results(
    folder: Path,
    name: str,
    found: dict[str, Any],
    text_of: Callable[[dict[str, Any]], str],
    draw: Callable[[dict[str, Any], Path], list[Path]],
) -> list[Path]:
    """Write NAME.json, NAME.txt and pictures, in this order, print the text and say what was written.

    Args:
        folder: of the study.
        name: of the files.
        found: the numbers, for JSON.
        text_of: renders them as text.
        draw: draws them into a folder, and returns the files.

    Returns:
        The pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(dumps(found, indent=2) + "\n", "utf-8")
    text = text_of(found)
    (folder / f"{name}.txt").write_text(text + "\n", "utf-8")
    print(text)
    pictures = draw(found, folder)
    print(f"\n{folder}: {', '.join([f'{name}.json', f'{name}.txt', *(path.name for path in pictures)])}")
    return pictures


def say_aside(text: str) -> None:
    """Print to stderr."""
    print(text, file=sys.stderr, flush=True)
