"""`deepnarrow plan`: the layouts of a cluster, the fastest that fit first."""

import argparse
import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.plan import explain, write
from launch.plan.dry_runs import Checked, check
from launch.plan.picture import draw
from launch.plan.request import Request, overrides_of, read
from launch.plan.rows import Row, as_json, counted, gib, rows_of
from launch.plan.tables import head, kept, tables
from launch.timeline import picture
from model.problems import BadInput
from parallel.layout import ParallelConfig, layout_for
from parallel.plan.predict import predict
from parallel.plan.search import Found, first_fitting, fullest, search


def run(options: argparse.Namespace) -> int:
    """Search, check the best by dry runs, and print, write and draw what was asked for.

    Raises:
        BadInput: nothing that was asked for can be planned, or no layout fits.
    """
    request = read(options.overrides, options.cluster, options.price)
    _judge(request, options)
    found = search(request.task, request.space, request.problems, predict)
    if not found.candidates:
        raise BadInput(_none(request, found))
    checked = _checked(request, found, options)
    explained = None if options.explain is None else explain.explain(request, found, options.explain)
    rows = rows_of(request, found.candidates, {one: run.peak for one, run in checked.runs.items()}, options.top)
    if options.picture:
        draw(rows[0], checked.runs[rows[0].candidate.choice], options.picture)
    how = write.write(request, rows[0], options.write) if options.write else None
    plan = _Plan(request, found, rows, checked, explained, how)
    print(json.dumps(plan.as_json(), indent=2) if options.json else plan.as_text())
    return 0


@dataclass(frozen=True)
class _Plan:
    """What there is to say.

    Attributes:
        request: what was planned.
        found: the outcome of the search, without what dry runs have shown not to fit.
        rows: the fastest.
        checked: by dry runs.
        explained: the layout that was asked about; None without one.
        how: the command that trains with what was written; None without a file.
    """

    request: Request
    found: Found
    rows: list[Row]
    checked: Checked
    explained: explain.Explanation | None
    how: str | None

    def as_json(self) -> dict[str, Any]:
        return {
            **as_json(self.request, self.found, self.rows),
            "dropped": self.checked.dropped,
            "explained": None if self.explained is None else explain.as_json(self.explained),
            "train": self.how,
        }

    def as_text(self) -> str:
        parts = [head(self.request, self.found)]
        if self.checked.ranks:
            number, ranks = len(self.checked.runs) - len(self.checked.dropped), self.checked.ranks
            first = "the first" if number == 1 else f"the first {number}"
            parts.append(f"memory of {first} by dry runs of {counted(ranks, 'rank')}, of the others by formula")
        parts += [f"dropped: {one}" for one in self.checked.dropped]
        parts.append(tables(self.request, self.rows, self.found))
        if self.explained is not None:
            parts.append(f"\n{explain.as_text(self.request, self.found, self.explained)}")
        if self.how is not None:
            parts.append(f"\nto train with the first: {self.how}")
        return "\n".join(parts)


def _judge(request: Request, options: argparse.Namespace) -> None:
    """Judge the options before anything is computed.

    Raises:
        BadInput: with every problem.
    """
    problems = []
    for option, value, least in (("--top", options.top, 1), ("--dry-runs", options.dry_runs, 0)):
        if value < least:
            problems.append(f"{option}={value}: must be at least {least}; {option}=3 would work")
    checks: list[Callable[[], object]] = []
    if options.explain is not None:
        checks.append(lambda: explain.choice_of(request, options.explain))
    if options.write:
        checks.append(lambda: write.checked(request, options.write))
    if options.picture:
        checks.append(lambda: _drawable(options.picture))
    for one in checks:
        try:
            one()
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)


def _drawable(path: Path) -> None:
    with picture("--picture", path):
        if not path.absolute().parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


def _checked(request: Request, found: Found, options: argparse.Namespace) -> Checked:
    """Check the fastest by dry runs, one at least for a picture; those that do not fit are left out of `found`."""
    number = max(options.dry_runs, 1 if options.picture else 0)
    if not number:
        return Checked(found.candidates, {}, [], 0)
    checked = check(request, found.candidates, number)
    found.candidates = checked.candidates
    return checked


def _none(request: Request, found: Found) -> list[str]:
    """Say why there is no layout, and what would have one."""
    cluster = request.cluster
    on = f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.name}"
    if found.least is not None:
        # What does not fit for its state alone was not tried with more recomputation, which makes it a little less.
        tried = [
            replace(found.least[0], recompute=one, head_pieces=pieces) for one, pieces in request.space.recomputations
        ]
        needs = [(choice, *fullest(request.task.job(choice))) for choice in tried]
        choice, rank, memory = min(needs, key=lambda one: one[2].peak)
        said = (
            f"--cluster: no layout of {request.config.preset} fits {on}: the one that needs least, "
            f"{' '.join(overrides_of(choice))}, needs {gib(memory.peak)} GiB on rank {rank} of its pipeline, and "
            f"a plan may fill {gib(cluster.allocatable_bytes)}"
        )
        return [f"{said}; {_more_machines(request)} would work"]
    if found.examples:
        return list(found.examples.values())
    values = {name: value for name, value in request.fixed.items() if name in ("pp", "tp", "dp")}
    try:
        layout_for(replace(ParallelConfig(), **values), cluster.world_size)
    except ValueError as error:
        return [str(error)]
    return [f"{' '.join(kept(request))}: no layout of {on} has these; fewer of them would work"]


def _more_machines(request: Request) -> str:
    """Find how many times as many machines would do."""
    cluster = request.cluster
    for _ in range(12):
        cluster = replace(cluster, nodes=2 * cluster.nodes)
        larger = replace(request, cluster=cluster)
        if first_fitting(larger.task, larger.space, larger.problems) is not None:
            return f"{cluster.nodes} such machines"
    return "a smaller model"
