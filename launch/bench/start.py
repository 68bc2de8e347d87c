"""Seconds until the first step of a large run: what is measured for one process here, and an estimate for many.

What this machine cannot show, a network and a file system that thousands share, is assumed; each assumption is printed
with the estimate that rests on it.
"""

import json
import pickle
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.table import Table

from conf.compose import quoted
from conf.schema import Config
from conf.validate import Machine
from launch.bench.common import RandomWeights, composed
from launch.tables import rendered
from model.transformer import full_shapes
from parallel.groups import split_color
from parallel.layout import Layout, layout_for
from parallel.processes import free_port
from parallel.stages import split
from train.preflight import preflight

DEFAULTS = ["model=67b", "parallel.tp=8"]
RUNS = ({"ranks": 512, "pp": 4}, {"ranks": 4096, "pp": 16})
ASSUMED = {
    "ranks_per_host": (8, "ranks of a host, whose page cache reads a file once"),
    "files_per_second": (20_000, "files that a shared file system opens a second, for all hosts together"),
    "bytes_per_second": (1e9, "bytes a second that rank 0's store sends"),
    "seconds_per_split": (0.5, "seconds of a call in which NCCL splits all ranks into groups"),
    "seconds_per_connection": (0.002, "seconds in which a rank over Gloo connects to another, one after another"),
}
"""What no single machine shows: its value and what it means."""
_IMPORTS = """
import json, sys, time
sys.path.insert(0, "")  # the working directory, which PYTHONSAFEPATH leaves out and PYTHONPATH would hide
begin = time.perf_counter()
import train.pretrain, train.preflight, train.loop, parallel.deepspeed_engine
files = {f for m in list(sys.modules.values()) if (f := getattr(m, "__file__", None))}
print(json.dumps([time.perf_counter() - begin, len(files)]))
"""


def measure(overrides: Sequence[str]) -> dict[str, Any]:
    """Measure what one process needs for its start, and estimate the start of 512 and 4,096.

    Args:
        overrides: of the run; `DEFAULTS` come first. Its data are prepared, as for any run.
    """
    config = composed(DEFAULTS, overrides).config
    one = {**_imports(), **_preflight(), **_store(), **_drawing(config)}
    assumed = {key: value for key, (value, _) in ASSUMED.items()}
    return {"one": one, "assumed": assumed, "estimates": [estimate(config, one, **run) for run in RUNS]}


def estimate(config: Config, one: dict[str, float], ranks: int, pp: int) -> dict[str, Any]:
    """Estimate the start of a run from what was measured for one process.

    Args:
        config: the model and its tensor parallelism.
        one: the measurements.
        ranks: processes of the run.
        pp: stages.

    Returns:
        Seconds by part and in all, and the calls that make process groups.
    """
    cost = {key: value for key, (value, _) in ASSUMED.items()}
    tp = config.parallel.tp
    layout = layout_for(config.parallel.__class__(pp=pp, tp=tp), ranks)
    hosts = ranks / cost["ranks_per_host"]
    calls = split_calls(layout)
    parameters = _parameters(config)
    largest = max(sum(parameters[stage.start : stage.stop]) for stage in split(parameters, pp))
    seconds = {
        "imports": one["import_seconds"] + hosts * one["import_files"] / cost["files_per_second"],
        "preflight": one["preflight_seconds"] + ranks * one["shared_bytes"] / cost["bytes_per_second"],
        "meeting": ranks * one["requests"] * one["seconds_per_request"],
        # NCCL's, and two groups of all ranks over Gloo.
        "groups": calls * cost["seconds_per_split"] + 2 * ranks * cost["seconds_per_connection"],
        "weights": largest / one["parameters_per_second"],
    }
    return {"ranks": ranks, "layout": str(layout), "calls": calls, "seconds": seconds, "total": sum(seconds.values())}


def split_calls(layout: Layout) -> int:
    """Count the calls in which NCCL splits the world into the groups of a layout, as `parallel.groups` makes them."""
    pp, dp, tp = layout.pp, layout.dp, layout.tp
    replicas = dp * tp
    pipelines = [range(first, layout.world_size, replicas) for first in range(replicas)]
    kinds = [
        pipelines,
        [range(s * replicas + t, (s + 1) * replicas, tp) for s in range(pp) for t in range(tp)],
        [range(first, first + tp) for first in range(0, layout.world_size, tp)],
    ]
    for start in (0, 0, 1, 1):  # links to the next rank and back, of every other pair
        pairs = range(start, pp - 1, 2)
        kinds.append([range(ranks[a], ranks[a + 1] + 1, replicas) for ranks in pipelines for a in pairs])
    # Sets that look the same to NCCL get calls of their own.
    same = (Counter(split_color(ranks) for ranks in sets) for sets in kinds if sets and len(sets[0]) > 1)
    return sum(max(counts.values()) for counts in same)


def as_text(found: dict[str, Any]) -> str:
    """Write the measurements, the estimates and what they assume."""
    one = found["one"]
    columns = ["imports", "preflight", "meeting", "groups", "weights", "all, s"]
    table = Table("ranks", "layout", *columns, title="estimated seconds before the first step", title_justify="left")
    for run in found["estimates"]:
        parts = [f"{seconds:.1f}" for seconds in run["seconds"].values()]
        table.add_row(f"{run['ranks']:,}", run["layout"], *parts, f"{run['total']:.0f}")
    return "\n".join(
        [
            f"measured, one process: imports {one['import_seconds']:.1f} s ({one['import_files']:,} files); preflight "
            f"{one['preflight_seconds']:.2f} s, which rank 0 does for all, and {one['shared_bytes']:,} bytes of it for",
            f"each other rank; a request to the store {1e6 * one['seconds_per_request']:.0f} us; "
            f"{one['parameters_per_second'] / 1e6:.0f} million weights drawn a second",
            rendered(table),
            "assumed, since one machine does not show it:",
            *(f"  {value:g} {meaning}" for value, meaning in ASSUMED.values()),
        ]
    )


def _imports() -> dict[str, float]:
    """Measure the imports of a rank in a process of its own."""
    said = subprocess.run([sys.executable, "-c", _IMPORTS], capture_output=True, text=True, check=True, cwd=_root())
    seconds, files = json.loads(said.stdout.splitlines()[-1])
    return {"import_seconds": seconds, "import_files": files}


def _root() -> str:
    from train.pretrain import _ROOT

    return _ROOT


def _preflight() -> dict[str, float]:
    """Measure rank 0's preflight on data that are prepared, and what it hands to each other rank."""
    machine = Machine(gpus=0, elsewhere=True)
    with tempfile.TemporaryDirectory() as cache:
        small = ["model=tiny", "data=files", f"data.path={quoted(Path(json.__file__).parent / '*.py')}"]
        small += ["model.vocab_size=512", "data.val_fraction=0", f"data.cache_dir={quoted(cache)}"]
        preflight(small, machine=machine, writes=False)
        begin = time.perf_counter()
        prepared = preflight(small, machine=machine, writes=False)
        seconds = time.perf_counter() - begin
    return {"preflight_seconds": seconds, "shared_bytes": len(zlib.compress(pickle.dumps(prepared), 1))}


def _store(requests: int = 2000) -> dict[str, float]:
    """Measure a request to the store in which ranks meet; each makes some twenty before the process group is there."""
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    begin = time.perf_counter()
    for _ in range(requests):
        store.add("measured", 1)
    return {"requests": 20, "seconds_per_request": (time.perf_counter() - begin) / requests}


def _drawing(config: Config) -> dict[str, float]:
    """Measure how fast a rank draws weights, by one matrix of the model: each is drawn whole, then cut."""
    weights, shapes = RandomWeights(config.model), full_shapes(config.model)
    name = max(shapes, key=lambda name: shapes[name].numel())
    begin = time.perf_counter()
    drawn = weights.read(name)
    return {"parameters_per_second": drawn.numel() / (time.perf_counter() - begin)}


def _parameters(config: Config) -> list[float]:
    """Count the parameters of each layer."""
    counts: dict[str, float] = {}
    for name, shape in full_shapes(config.model).items():
        layer = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else name.split(".")[0]
        counts[layer] = counts.get(layer, 0) + shape.numel()
    return list(counts.values())
