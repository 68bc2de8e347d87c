"""What a section of a study is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.study.plan import Plan, Uptraining
from launch.study.results import Results
from launch.trainings.wandb_of_study import Table

Found = Mapping[str, Any]
"""Findings of a section, or the facts of a study (`launch.study.findings.facts`): what JSON can hold."""
SIZE = (7.2, 4.4)
"""The size of a picture in inches, at 150 dots each."""


@dataclass(frozen=True)
class Part:
    """A section.

    Attributes:
        title: its question, as a heading.
        runs: the uptrainings that it needs.
        findings: measures; from the results of trainings and the findings of earlier sections, by name.
        text: writes findings as tables and a paragraph of what they say by rule; from them and the facts of the study.
        tables: those for W&B, by a name that no picture has, since W&B logs both by name.
        draw: draws pictures into a folder; from findings and the facts of the study.
    """

    title: str
    runs: Callable[[Plan], Sequence[Uptraining]]
    findings: Callable[[Results, Mapping[str, Found]], dict[str, Any]]
    text: Callable[[Found, Found], str]
    tables: Callable[[Found], Mapping[str, Table]]
    draw: Callable[[Found, Found, Path], Sequence[Path]]


def no_runs(study: Plan) -> list[Uptraining]:
    """Return that nothing is trained."""
    return []
