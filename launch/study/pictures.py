"""The pictures of a study, by section."""

from collections.abc import Mapping
from pathlib import Path

from launch.study.findings import FAILED, PARTS
from launch.study.part import Found, Part
from launch.study.settings import Section


def draw(found: Found, folder: Path, parts: Mapping[Section, Part] = PARTS) -> list[Path]:
    """Draw the pictures of all sections that have findings, as PNG files.

    Args:
        found: the result of `launch.study.findings.findings`.
        folder: the folder of the files, which is there.
        parts: what sections are made of.
    """
    import matplotlib

    matplotlib.use("Agg")  # no screen is needed
    paths: list[Path] = []
    for name, section in found["sections"].items():
        if FAILED not in section:
            paths += parts[Section(name)].draw(section, found, folder)
    return paths
