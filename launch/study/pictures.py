"""The pictures of a study, by section."""

from collections.abc import Callable, Mapping
from pathlib import Path

from launch.study.findings import PARTS, made
from launch.study.part import Found, Part
from launch.study.settings import Section
from launch.trainings.written import say_aside


def draw(
    found: Found, folder: Path, parts: Mapping[Section, Part] = PARTS, say: Callable[[str], None] = say_aside
) -> list[Path]:
    """Draw the pictures of all sections that have findings, as PNG files.

    Args:
        found: the result of `launch.study.findings.findings`.
        folder: the folder of the files, which is there.
        parts: what sections are made of.
        say: is told which section has no pictures, and why.
    """
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    of_sections = made("pictures", found, lambda name, section: parts[name].draw(section, found, folder), say)
    return [path for paths in of_sections.values() for path in paths]
