"""`deepnarrow plan`: the layouts of a cluster, the fastest that fit first."""

import argparse
from dataclasses import replace
from typing import Any

from launch.plan import explain
from launch.plan.request import Request, overrides_of, read
from launch.plan.rows import as_json, gib, rows_of
from launch.plan.tables import head, kept, tables
from model.problems import BadInput
from parallel.layout import ParallelConfig, layout_for
from parallel.plan.predict import predict
from parallel.plan.search import Found, first_fitting, search


def run(options: argparse.Namespace) -> int:
    """Search, check the best by dry runs, and print, write and draw what was asked for.

    Raises:
        BadInput: nothing that was asked for can be planned, or no layout fits.
    """
    request = read(options.overrides, options.cluster, options.price)
    found = search(request.task, request.space, request.problems, predict)
    if not found.candidates:
        raise BadInput(_none(request, found))
    rows = rows_of(request, found.candidates, {}, options.top)
    more: dict[str, Any] = {}
    explained = None if options.explain is None else explain.explain(request, found, options.explain)
    if options.json:
        more["explained"] = None if explained is None else explain.as_json(explained)
        print(as_json(request, found, rows, more))
        return 0
    print(head(request, found))
    print(tables(request, rows, found))
    if explained is not None:
        print(f"\n{explain.as_text(request, found, explained)}")
    return 0


def _none(request: Request, found: Found) -> list[str]:
    """Say why there is no layout, and what would have one."""
    cluster = request.cluster
    on = f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.name}"
    if found.least is not None:
        choice, rank, memory = found.least
        said = (
            f"--cluster: no layout of {request.config.preset} fits {on}: the one that needs least, "
            f"{' '.join(overrides_of(choice))}, needs {gib(memory.peak)} GiB on rank {rank} of its pipeline, and "
            f"a plan may fill {cluster.allocatable_gib:.1f}"
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
