"""Steps of several layouts on this machine's cores against what a plan predicts from this machine's own figures.

Ranks are processes with a thread each, over Gloo, on the CPU on every machine. In each round they measure products,
attention and memory as `deepnarrow bench cluster` does, and train a step of every layout, by turns, with the engine of
a run: a machine that is slower for a while is so for both. Links are measured as by `deepnarrow check`, but behind
computation: ranks that share matrices meet at each message, and wait there for the one that was held up.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.table import Table

from conf.schema import Config
from launch.bench.cluster import ON_CPU, facts, measured_here, merged
from launch.bench.common import agreed_rounds, composed, device_name, kendall_tau
from launch.check.calibrate import links_of
from launch.check.measure import LinkTime, RankFindings, link_times
from launch.tables import rendered
from model.batch import Batch
from model.problems import BadInput
from parallel import schedules
from parallel.engine import Engine, EngineSettings, build_engine
from parallel.groups import make_ranks
from parallel.layout import Layout, ParallelConfig, Recompute
from parallel.layout import problems as layout_problems
from parallel.plan.cluster import Cluster
from parallel.plan.job import Job
from parallel.plan.predict import predict
from parallel.processes import free_port
from parallel.schedules import Pass, Schedule, batch_problems, placement_of
from train.job import computes_in_bf16
from train.optimizer import adamw
from train.predicted import predicted_terms
from train.strict_json import dumps
from train.timeline import seconds_of

T = TypeVar("T")
DEFAULTS = [*ON_CPU, "train.global_batch=4"]
UNDISTURBED = 0.04
"""The largest share of the machine's cores that processes of others may take during a step that counts."""


@dataclass(frozen=True)
class Case:
    """A layout to train steps of.

    Attributes:
        pp, dp, tp: the rank grid.
        schedule, virtual: the pipeline's.
        micro_batch: sequences of a micro-batch.
        recompute: what blocks recompute.
    """

    pp: int = 1
    dp: int = 1
    tp: int = 1
    schedule: str = "1f1b"
    virtual: int | None = None
    micro_batch: int = 1
    recompute: str = "none"

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return self.pp * self.dp * self.tp

    def job(self, config: Config) -> Job:
        """Return the job of a step of the whole batch."""
        layout = Layout(self.dp, self.pp, self.tp, self.tp > 1)
        return Job(
            config.model,
            layout,
            EngineSettings(
                micro_batch=self.micro_batch,
                accumulation=int(config.train.global_batch) // (self.micro_batch * self.dp),
                clip=config.optimizer.clip,
                bf16=computes_in_bf16(config, on_gpus=False),
                seed=1,
                seq_len=config.train.seq_len,
                recompute=Recompute[self.recompute],
                schedule=Schedule[self.schedule],
                placement=placement_of(Schedule[self.schedule], self.pp, self.virtual),
            ),
        )

    def problems(self, config: Config) -> list[str]:
        """Say why the model and the batch cannot be trained so."""
        cut = ParallelConfig(pp=self.pp, dp=self.dp, tp=self.tp, schedule=Schedule[self.schedule])
        cut.virtual_stages = self.virtual
        batch, sequences = int(config.train.global_batch), self.micro_batch * self.dp
        if found := layout_problems(cut, config.model):
            return found
        if batch % sequences:
            return [f"train.global_batch={batch}: is no multiple of the {sequences} sequences of dp {self.dp} micro-"
                    f"batches of {self.micro_batch}; train.global_batch={8 * sequences} would work"]  # fmt: skip
        return batch_problems(cut.schedule, self.pp, batch, sequences)

    def __str__(self) -> str:
        grid = " ".join(f"{key}{size}" for key in ("pp", "dp", "tp") if (size := getattr(self, key)) > 1)
        schedule = "" if self.pp == 1 else f" {self.schedule}" + (f" x {self.virtual}" if self.virtual else "")
        batch = f" micro-batch {self.micro_batch}" if self.micro_batch > 1 else ""
        return grid + schedule + batch + (f" recompute {self.recompute}" if self.recompute != "none" else "")


CASES = (
    *[Case(pp=2), Case(pp=2, micro_batch=2), Case(pp=2, micro_batch=4), Case(pp=2, schedule="interleaved", virtual=2)],
    *[Case(pp=2, schedule="zero_bubble"), Case(pp=2, schedule="zbv"), Case(pp=2, recompute="full")],
    *[Case(dp=2), Case(dp=2, recompute="full"), Case(tp=2), Case(tp=2, micro_batch=4)],
    *[Case(pp=4), Case(pp=2, dp=2), Case(pp=2, tp=2), Case(dp=4)],
)
"""The layouts that are measured, on two and on four ranks."""


def measure(
    overrides: Sequence[str], cases: Sequence[Case] = CASES, rounds: int = 5, seconds: float = 900.0
) -> dict[str, Any]:
    """Train steps of each layout by turns, and predict them.

    Args:
        overrides: of the model, `train.seq_len` and `train.global_batch`, after `DEFAULTS`.
        cases: the layouts.
        rounds: the number of rounds, in each of which every layout takes two steps, of which the second counts; one
            more begins, in which it takes one that does not.
        seconds: after which no further round begins.

    Returns:
        ``rows``, for each layout with ``measured``, the median seconds of its steps in which others took no more than
        `UNDISTURBED` of the cores (or of the one in which they took least), their extremes, how many ``counted`` of
        all, the largest share that others took in those (``others``), ``predicted`` and
        their ``ratio``, and where there are stages ``terms``, the seconds of each kind of pass, measured and predicted,
        means over the ranks (predicted as if a core were a rank's own); ``worst``, the largest deviation of a ratio
        from 1; ``tau``, Kendall's rank correlation of measured and predicted steps, and ``told_apart``, from
        `told_apart`; ``clusters``, the keys that were
        measured, by the number of ranks; ``others``, the largest share of the cores that others took meanwhile.

    Raises:
        BadInput: the settings cannot work.
    """
    config = composed(DEFAULTS, overrides).config
    if not isinstance(config.train.global_batch, int):
        raise BadInput([f"train.global_batch={config.train.global_batch}: one batch is measured; 8 would work"])
    if problems := [problem for case in cases for problem in case.problems(config)]:
        raise BadInput(list(dict.fromkeys(problems)))
    started: dict[int, list[dict[str, Any]]] = {}
    sizes = sorted({case.ranks for case in cases})
    for ranks in sizes:
        own = [case for case in cases if case.ranks == ranks]
        with tempfile.TemporaryDirectory() as folder:
            job = (ranks, free_port(), config, own, rounds, seconds / len(sizes), folder)
            torch.multiprocessing.spawn(_rank, job, ranks)
            started[ranks] = [json.loads((Path(folder) / f"{rank}.json").read_text("utf-8")) for rank in range(ranks)]
    devices = [one for found in started.values() for rank in found for one in rank["devices"]]
    device = merged(devices, config, _dtype(config))["values"]
    rows, clusters = [], {}
    for ranks, found in started.items():
        cluster, clusters[str(ranks)] = _cluster(device, found)
        rows += [
            _row(case, config, cluster, found[0]["steps"][at], [one["passes"][at] for one in found])
            for at, case in enumerate(case for case in cases if case.ranks == ranks)
        ]
    measured, predicted = ([row[key] for row in rows] for key in ("measured", "predicted"))
    return {
        "device": device_name(torch.device("cpu")),
        "parameters": config.model.num_params,
        "tokens": config.train.global_batch * config.train.seq_len,
        "rows": rows,
        "others": max(found[0]["others"] for found in started.values()),
        "worst": max(abs(row["ratio"] - 1) for row in rows),
        "tau": kendall_tau(measured, predicted),
        "told_apart": told_apart(rows),
        "clusters": clusters,
    }


def _cluster(device: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> tuple[Cluster, dict[str, Any]]:
    """Return the cluster of one start, and the keys of it that were measured.

    Args:
        device: the keys of the device.
        found: by each rank of the start.
    """
    of_ranks = [RankFindings.from_json(one["links"]) for one in found]
    links = averaged(of_ranks)
    values = {**device, **links_of([replace(one, links=links if one is of_ranks[0] else []) for one in of_ranks])}
    cores = len(os.sched_getaffinity(0))
    place = {"gpus_per_node": len(found), "devices_per_node": float(min(cores, len(found)))}
    return Cluster(**{**facts(torch.device("cpu"), values), **values, **place}), values


def averaged(found: Sequence[RankFindings]) -> list[LinkTime]:
    """Return each message with its mean seconds over the ranks that sent it: one waits where another comes late."""
    seconds: dict[tuple[str, str, tuple[int, ...], int], list[float]] = {}
    for link in (link for one in found for link in one.links):
        seconds.setdefault((link.kind, link.operation, link.ranks, link.num_bytes), []).append(link.seconds)
    return [LinkTime(*what, statistics.mean(of)) for what, of in seconds.items()]


def _row(
    case: Case,
    config: Config,
    cluster: Cluster,
    steps: Sequence[tuple[float, float]],
    passes: Sequence[Mapping[str, float]],
) -> dict[str, Any]:
    prediction = predict(case.job(config), cluster)
    counted = undisturbed(steps)
    times = [seconds for seconds, _ in counted]
    measured = statistics.median(times)
    row = {
        **asdict(case),
        "case": str(case),
        "measured": measured,
        "extremes": [min(times), max(times)],
        "counted": [len(times), len(steps)],
        "others": max(share for _, share in counted),
        "predicted": prediction.seconds,
        "ratio": prediction.seconds / measured,
    }
    if case.pp > 1:
        expected = predicted_terms(prediction)
        row["terms"] = {
            name: [statistics.mean(one[name] for one in passes), expected[name]]
            for name in ("forward", "backward", "weights")
        }
    return row


def undisturbed(steps: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return those of some steps, each with the share of the cores that others took, that were not disturbed.

    Where all were, it is the one in which others took least.
    """
    return [step for step in steps if step[1] <= UNDISTURBED] or [min(steps, key=lambda step: step[1])]


def told_apart(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare the order of layouts whose steps were measured apart: all of one are shorter than all of the other.

    The order of any other pair is not known.

    Returns:
        ``pairs``, how many there are of all (``of``), and ``tau``, the share of them that is predicted in the order in
        which it was measured, less the share that is not; None without any.
    """
    pairs = list(combinations(rows, 2))
    apart = [
        (one, other)
        for one, other in pairs
        if one["extremes"][1] < other["extremes"][0] or other["extremes"][1] < one["extremes"][0]
    ]
    signs = [(a["measured"] - b["measured"]) * (a["predicted"] - b["predicted"]) > 0 for a, b in apart]
    tau = (2 * sum(signs) - len(signs)) / len(signs) if signs else None
    return {"pairs": len(apart), "of": len(pairs), "tau": tau}


def as_text(found: dict[str, Any]) -> str:
    """Render the results of `measure` as text."""
    title = (
        f"steps of {found['tokens']:,} tokens, {found['parameters']:,} parameters, a thread a rank; {found['device']}"
    )
    columns = ["layout", "ranks", "s a step", "steps", "others", "predicted", "ratio"]
    table = Table(*columns, title=title, title_justify="left")
    for row in found["rows"]:
        low, high = row["extremes"]
        ranks = str(row["pp"] * row["dp"] * row["tp"])
        cells = [f"{row['measured']:.2f} ({low:.2f} to {high:.2f})", "{} of {}".format(*row["counted"])]
        cells += [f"{row['others']:.0%}", f"{row['predicted']:.2f}", f"{row['ratio']:.3f}"]
        table.add_row(row["case"], ranks, *cells)
    pairs = found["told_apart"]
    apart = (
        f", {pairs['tau']:.2f} over the {pairs['pairs']} of {pairs['of']} pairs whose steps were measured apart"
        if pairs["pairs"]
        else ""
    )
    return "\n".join(
        [
            rendered(table),
            f"others: the share of the cores that other processes took ({found['others']:.0%} while the links were "
            f"measured); where there are steps with {UNDISTURBED:.0%} or less, the rest do not count",
            f"no step is more than {found['worst']:.1%} off; Kendall's tau of the ranking {found['tau']:.2f}{apart}",
        ]
    )


def _rank(
    rank: int, ranks: int, port: int, config: Config, cases: Sequence[Case], rounds: int, seconds: float, folder: str
) -> None:
    """Run one process: it measures its core and its links, then steps of each layout; it writes what it found."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    from parallel.deepspeed_engine import start_process_group

    device = start_process_group()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    busy = min(ranks, len(os.sched_getaffinity(0)))
    together = partial(dist.barrier, dist.new_group(list(range(busy))))
    devices: list[dict[str, Any]] = []
    links, others = _calm(lambda: _links(rank, ranks, config, device))
    engines = [_engine(case.job(config), config) for case in cases]
    steps: list[list[tuple[float, float]]] = [[] for _ in cases]
    passes: list[dict[str, float]] = [{} for _ in cases]
    for number in agreed_rounds(rounds, 1, seconds - (time.perf_counter() - begin)):
        if number and rank < busy:
            devices.append(measured_here(config, device, _dtype(config), together, rank, busy))
        for at, (case, engine) in enumerate(zip(cases, engines, strict=True)):
            _step(engine, case, config)  # it leaves weights on their way, as the step before does in a run
            if number:  # the first opens connections and allocates
                (taken, passes[at]), disturbed = _watched(partial(_step, engine, case, config))
                steps[at].append((taken, disturbed))
    for engine in engines:
        engine.wait()
    told: dict[str, Any] = {"devices": devices, "links": asdict(links), "others": others, "steps": steps}
    told["passes"] = passes
    (Path(folder) / f"{rank}.json").write_text(dumps(told), "utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _links(rank: int, ranks: int, config: Config, device: torch.device) -> RankFindings:
    """Measure the links of a pipeline of all ranks, and of all of them sharing matrices, which replicas' are like."""
    model, links = config.model, []
    x = torch.randn(config.train.seq_len, model.d_model, device=device)
    weight = torch.randn(model.d_ff, model.d_model, device=device)
    for layout in (Layout(1, ranks, 1), Layout(1, 1, ranks)):
        grid = make_ranks(layout, schedules.Placement(layout.pp), 1)
        links += link_times(grid, device, dist.group.WORLD, before=lambda: F.linear(x, weight))
    return RankFindings(rank, "here", "cpu", 0.0, 0.0, links)


def _dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if computes_in_bf16(config, on_gpus=False) else torch.float32


def _engine(job: Job, config: Config) -> Engine:
    optimizer = partial(adamw, settings=config.optimizer)
    return build_engine(job.model, job.layout, job.stages, job.settings, make_optimizer=optimizer)


def _step(engine: Engine, case: Case, config: Config) -> tuple[float, dict[str, float]]:
    """Train a step; return the seconds of the slowest rank, and those of this rank's passes by kind."""
    micro_batches = int(config.train.global_batch) // (case.micro_batch * case.dp)
    begin = time.perf_counter()
    result = engine.step(_batches(case, config, micro_batches), config.optimizer.lr, micro_batches)
    slowest = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    kinds = {"forward": Pass.F, "backward": Pass.B, "weights": Pass.W}
    return float(slowest), {name: seconds_of(what, result.spans) for name, what in kinds.items()}


def _watched(run: Callable[[], T]) -> tuple[T, float]:
    """Run something on all ranks together; return what it returns, and the share of the cores that others took."""
    dist.barrier()
    begin, own, all_of_them = time.perf_counter(), time.process_time(), _busy_seconds()
    found = run()
    dist.barrier()
    ours, others = torch.tensor(time.process_time() - own, dtype=torch.float64), _busy_seconds() - all_of_them
    taken = time.perf_counter() - begin
    dist.all_reduce(ours)
    share = torch.tensor(max(others - float(ours), 0.0) / taken / (os.cpu_count() or 1), dtype=torch.float64)
    dist.all_reduce(share, op=dist.ReduceOp.MAX)
    return found, float(share)


def _calm(run: Callable[[], T], tries: int = 3) -> tuple[T, float]:
    """Run something until others do not disturb it, or so many times; return what it did when they did so least."""
    found: list[tuple[T, float]] = []
    while len(found) < tries and not any(share <= UNDISTURBED for _, share in found):
        found.append(_watched(run))
    return min(found, key=lambda one: one[1])


def _busy_seconds() -> float:
    """Return the seconds for which all cores of the machine have been busy so far, whoever kept them so."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


def _batches(case: Case, config: Config, micro_batches: int) -> Iterator[Batch]:
    """Yield the micro-batches of a step, random tokens and labels, int64 (B, L), the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.micro_batch, config.train.seq_len + 1)
    for _ in range(micro_batches):
        tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        yield Batch(tokens[:, :-1], tokens[:, 1:])
