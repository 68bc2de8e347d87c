"""What this machine's devices take for a model's operations, as a cluster file for plans (`--save`).

On a GPU one process measures. On a CPU ranks share cores: as many processes as there are cores measure at the same
time, a thread each, as the ranks of a run compute. What links do is measured by `deepnarrow check --save`.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.distributed as dist
from rich.table import Table

from conf.schema import Config
from launch.bench.calibration import Together, passes_of, predicted, rounded, traffic_share, values_of_device
from launch.bench.common import composed, device_name
from launch.tables import rendered
from parallel.environment import timeout
from parallel.plan.cluster import Cluster
from parallel.processes import free_port
from train.job import computes_in_bf16
from train.metrics import known_gpu
from train.strict_json import dumps

ON_GPU = ["model=7b"]
ON_CPU = [
    *["model.n_layers=8", "model.d_model=512", "model.n_heads=8", "model.n_kv_heads=2", "model.d_ff=1536"],
    *["model.vocab_size=8192", "model.max_seq_len=512", "train.seq_len=512"],
]
MOST_TP = {"cuda": 8, "cpu": 4}
"""The most tensor-parallel ranks whose shapes are measured."""
_RESERVED_GIB = 0.5
"""Memory of a rank on a CPU that no plan counts: Python, PyTorch and its libraries."""


def measure(overrides: Sequence[str]) -> dict[str, Any]:
    """Measure this machine's device; see `launch.bench.calibration`.

    Args:
        overrides: of the model whose shapes are measured, `train.micro_batch`, `train.seq_len` and `train.precision`.

    Returns:
        ``values``, the keys of a `parallel.plan.cluster.Cluster` that were measured, and ``facts``, those that need no
        measuring; ``passes``, the seconds of each layer's passes and those that the costs then predict; ``device``,
        ``precision``, ``processes``.

    Raises:
        BadInput: the settings cannot work.
    """
    on_gpu = torch.cuda.is_available()
    config = composed(ON_GPU if on_gpu else ON_CPU, overrides).config
    dtype = torch.bfloat16 if computes_in_bf16(config, on_gpus=on_gpu) else torch.float32
    device = torch.device("cuda" if on_gpu else "cpu")
    processes = 1 if on_gpu else len(os.sched_getaffinity(0))
    of_all = [measured_here(config, device, dtype)] if on_gpu else _of_processes(config, dtype, processes)
    found = merged(of_all, config, dtype)
    about = {"device": device_name(device), "precision": str(dtype).removeprefix("torch."), "processes": processes}
    return {**about, **found, "facts": facts(device, found["values"])}


def facts(device: torch.device, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a cluster that this machine says without a measurement, one machine of it."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        name = torch.cuda.get_device_name(device)
        values = {"name": known_gpu(name) or name, "nodes": 1, "gpus_per_node": torch.cuda.device_count()}
        return {**values, "memory_gib": round(memory / 2**30, 1)}
    cores = len(os.sched_getaffinity(0))
    own = {"name": f"CPU with {cores} cores", "nodes": 1, "gpus_per_node": cores, "devices_per_node": float(cores)}
    own |= {"memory_gib": round(psutil.virtual_memory().total / 2**30 / cores, 1), "reserved_gib": _RESERVED_GIB}
    # Only one precision was measured; a plan in the other would be guessed by it.
    other = {"peak_tflops": "peak_fp32_tflops", "peak_fp32_tflops": "peak_tflops"}
    own |= {key: measured[there] for key, there in other.items() if key not in measured}
    return {**own, "tile_units": 0}


def _of_processes(config: Config, dtype: torch.dtype, number: int) -> list[dict[str, Any]]:
    """Measure in so many processes at the same time; return what each has found."""
    with tempfile.TemporaryDirectory() as folder:
        job = (free_port(), number, config, dtype, folder)
        torch.multiprocessing.spawn(_process, job, number)
        return [json.loads((Path(folder) / f"{rank}.json").read_text("utf-8")) for rank in range(number)]


def merged(found: Sequence[Mapping[str, Any]], config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """Merge what was measured alike, by several processes or several times: the median of each figure.

    Args:
        found: from `measured_here`.
        config, dtype: that were measured.

    Returns:
        The ``values`` and ``passes`` of `measure`.
    """
    keys = [key for key in found[0]["values"] if key != "products"]
    values: dict[str, Any] = {key: rounded(median(one["values"][key] for one in found)) for key in keys}
    rows = zip(*(one["values"]["products"] for one in found), strict=True)
    values["products"] = [[*same[0][:3], rounded(median(row[3] for row in same))] for same in rows]
    seconds = [median(same) for same in zip(*(one["passes"] for one in found), strict=True)]
    passes = passes_of(config, dtype, seconds)
    values["hbm_share"] = traffic_share(values, passes, dtype)
    cluster = Cluster(**values)
    return {"values": values, "passes": [[one.name, one.seconds, predicted(one, cluster, dtype)] for one in passes]}


def _process(rank: int, port: int, number: int, config: Config, dtype: torch.dtype, folder: str) -> None:
    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=number, timeout=timeout())
    found = measured_here(config, torch.device("cpu"), dtype, dist.barrier, rank, number)
    (Path(folder) / f"{rank}.json").write_text(dumps(found), "utf-8")
    dist.destroy_process_group()


def measured_here(
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    together: Together = lambda: None,
    number: int = 0,
    of: int = 1,
) -> dict[str, Any]:
    """Measure the device of this process, the `number`-th `of` so many; `merged` makes the findings of it.

    Returns:
        ``values``, the keys that were measured, and ``passes``, the seconds of each.
    """
    values, passes = values_of_device(config, device, dtype, MOST_TP[device.type], together, number, of)
    return {"values": values, "passes": [one.seconds for one in passes]}


def as_text(found: dict[str, Any]) -> str:
    """Render the results of `measure` as text."""
    values = {**asdict(Cluster()), **found["facts"], **found["values"]}
    peak = values["peak_tflops" if found["precision"] == "bfloat16" else "peak_fp32_tflops"]
    title = f"products in {found['precision']}, processes at once: {found['processes']}"
    on_cpu = values["devices_per_node"] is not None
    products = Table("m", "k", "n", "TFLOP/s", "of the peak", title=title, title_justify="left")
    for m, k, n, rate in found["values"]["products"]:
        products.add_row(*(f"{size:.0f}" for size in (m, k, n)), f"{rate:.4g}", f"{rate / peak:.1%}")
    passes = Table("pass", "ms", "predicted", "ratio")
    for name, seconds, expected in found["passes"]:
        passes.add_row(name, f"{1e3 * seconds:.2f}", f"{1e3 * expected:.2f}", f"{expected / seconds:.2f}")
    return "\n".join(
        [
            rendered(products),
            rendered(passes),
            f"attention {values['attention_forward_share']:.1%} of the peak forward and "
            f"{values['attention_backward_share']:.1%} backward, half of that at {values['attention_half_length']:.0f} "
            "tokens",
            f"memory {values['hbm_gb_per_s']:.4g} GB/s for a copy, {values['hbm_share']:.0%} of it for norms, sums and "
            f"the like; {values['launch_us']:.1f} us an operation",
            *([f"a core computes at {values['crowded_share']:.0%} of its speed while all do"] if on_cpu else []),
        ]
    )
