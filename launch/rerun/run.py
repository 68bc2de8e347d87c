"""The command `deepnarrow rerun RUN --step N`: is the data of a step at fault, or a device that computes wrongly?

The steps from the checkpoint before it are taken again, and the step itself is computed several times from the same
weights: by the run's ranks each on the device that it had, and then each on another.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from conf.compose import quoted
from conf.ranges import ranges_of
from conf.schema import Config
from launch.rerun import rank as rank_module
from launch.rerun.rank import Order, result_of
from launch.rerun.verdict import Attempt, Verdict, first_difference, judge, same
from launch.supervise import end_group, launcher_environment
from model.problems import BadInput
from parallel.layout import Layout
from parallel.processes import free_port
from train.checkpoint import history, manifest, resume
from train.checkpoint.folder import below, step_of
from train.checkpoint.manifest import Damaged
from train.job import computes_in_bf16
from train.length import length_of
from train.like import take_over
from train.preflight import preflight
from train.records import METRICS, records
from train.strict_json import dumps_flagged, with_nan
from train.uptrain import compose_with_source

HARDWARE = 1
"""The exit code where hardware is at fault, or the step could not be computed again."""
RANK = Path(rank_module.__file__)
_LEFT_OUT = [
    *["train.val_every=0", "train.val_at=[]", "train.profile=[]", "train.timeline_at=[]", "sample.tokens=0"],
    *["checkpoint.enabled=false", "wandb.mode=disabled", "train.deterministic=true", "train.straggler_percent=null"],
]


Start = Callable[[Path, int, Mapping[str, str]], Sequence[int | None]]
"""A function from a folder with the orders of ranks, their number and environment to their exit codes."""


@dataclass(frozen=True)
class Request:
    """A step to compute again.

    Attributes:
        run_dir: of the run.
        step: the number of the step.
        start: the checkpoint before it; None where the steps begin with the run's first.
        arguments: overrides of the run, with which it ends at the step.
        config: what they compose.
        layout: of the run.
        repeats: how often the step is computed in each placement.
        placements: of the ranks on devices.
    """

    run_dir: Path
    step: int
    start: Path | None
    arguments: list[str]
    config: Config
    layout: Layout
    repeats: int
    placements: int


@dataclass(frozen=True)
class Found:
    """What the ranks of all placements have found.

    Attributes:
        replays: of each placement, step, loss and norm of each step before.
        attempts: at the step, of all ranks and placements.
        samples: the first and last place of its batch.
    """

    replays: list[list[tuple[int, float, float]]]
    attempts: list[Attempt]
    samples: list[int]


def run(options: argparse.Namespace, start: Start | None = None) -> int:
    """Compute a step of a run again, print what differs, and say whether hardware or data is at fault.

    Args:
        options: source, step, repeats, placements, json.
        start: starts ranks, and returns their exit codes; None starts processes on this machine.

    Returns:
        0 where all agree, so that data or optimisation are at fault; 1 where hardware is.

    Raises:
        BadInput: there is no such run or step, no checkpoint before it, or too few devices.
    """
    with tempfile.TemporaryDirectory(prefix="deepnarrow-rerun-") as folder:
        request = request_of(options, Path(folder) / "run")
        found = computed(request, Path(folder), start or started)
        earlier = first_difference(found.replays)
        if earlier is not None:
            print(f"the placements differ at step {earlier:,} already, which is taken instead", file=sys.stderr)
            options = argparse.Namespace(**{**vars(options), "step": earlier})
            request = request_of(options, Path(folder) / "run")
            found = computed(request, Path(folder), start or started)
    of_run = {one["step"]: (one["loss"], one["grad_norm"]) for one in _recorded(request.run_dir) if "loss" in one}
    bf16 = computes_in_bf16(request.config, on_gpus=torch.cuda.is_available())
    tolerance = (1e-3, 1e-2) if bf16 else (1e-5, 1e-3)
    verdict = judge(found.attempts, of_run.get(request.step), tolerance)
    if options.json:
        attempts = [{**asdict(one), "notes": len(one.notes)} for one in found.attempts]
        what = {"step": request.step, "samples": found.samples, "recorded": of_run.get(request.step)}
        print(dumps_flagged({**what, "attempts": attempts, **asdict(verdict)}, indent=2))
    else:
        print("\n".join(_as_text(request, found, of_run, verdict)))
    return HARDWARE if verdict.hardware else 0


def request_of(options: argparse.Namespace, scratch: Path) -> Request:
    """Check what is asked for, before a process is started.

    Args:
        options: of the command.
        scratch: a folder that the run may write to in place of its own.

    Raises:
        BadInput: with every problem.
    """
    run_dir, step = Path(options.source).absolute(), options.step
    problems = [
        f"--{key}={getattr(options, key)}: must be at least 1"
        for key in ("step", "repeats", "placements")
        if getattr(options, key) < 1
    ]
    if problems:
        raise BadInput(problems)
    start = _checkpoint_before(run_dir, step)
    with redirect_stderr(io.StringIO()):
        overrides = [
            f"hydra.run.dir={quoted(scratch)}",
            f"resume={quoted(start) if start else 'never'}",
            f"train.max_steps={step}",
            *_LEFT_OUT,
        ]
        arguments = take_over([f"--like={run_dir}", *overrides])
    composition, _, _ = compose_with_source(arguments, checked=False)
    config: Config = composition.config
    if any(step in one for one in ranges_of(config.train.skip_steps)):
        raise BadInput([f"--step={step}: the run passes over it (train.skip_steps), and has computed nothing"])
    if (dp := _replicas(start, config)) is not None:
        arguments = [f"parallel.dp={dp}", *arguments]  # options come last
    prepared = preflight(arguments)
    begun = history.begun(prepared.config, resume.newest(prepared.start))
    if (last := length_of(prepared.config, begun).steps) < step:
        raise BadInput([f"--step={step}: the run ends with step {last:,}; --step={last} would work"])
    gpus = torch.cuda.device_count()
    placements = min(options.placements, gpus) if gpus else options.placements
    return Request(run_dir, step, start, arguments, prepared.config, prepared.layout, options.repeats, placements)


def computed(request: Request, folder: Path, start: Start) -> Found:
    """Compute the step in every placement, one after another.

    Raises:
        BadInput: a placement has failed.
    """
    replays, attempts, samples = [], [], [0, 0]
    for shift in range(request.placements):
        for of_rank in _placement(request, folder / f"{request.step}-{shift}", shift, start):
            attempts += [Attempt(**one) for one in of_rank["attempts"]]
            samples = of_rank["samples"]
        replays.append([(int(step), loss, norm) for step, loss, norm in of_rank["replay"]])
    return Found(replays, attempts, samples)


def _placement(request: Request, folder: Path, shift: int, start: Start) -> list[dict[str, Any]]:
    """Start the ranks, each on the device so many behind its own, and return what each has found."""
    folder.mkdir()
    size, devices = request.layout.world_size, _devices()
    turned = [*devices[shift:], *devices[:shift]]
    environment = {"WORLD_SIZE": str(size), "LOCAL_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port())}
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(turned)
    others = [argument for argument in request.arguments if not argument.startswith("hydra.run.dir=")]
    arguments = [f"hydra.run.dir={quoted(folder / 'run')}", *others]
    for rank in range(size):
        device = f"GPU {turned[rank]}" if devices else f"process {rank + shift}"
        Order(arguments, request.step, request.repeats, device).write(folder, rank)
    codes = start(folder, size, environment)
    if any(codes):
        raise BadInput([f"--step={request.step}: it could not be computed again (exit codes {codes} of the ranks, "
                        "which have said why)"])  # fmt: skip
    return [result_of(folder, rank) for rank in range(size)]


def started(folder: Path, size: int, environment: Mapping[str, str]) -> list[int | None]:
    """Start ranks on this machine; return their exit codes, None for one that another's failure has cut short.

    Args:
        folder: where they find their orders.
        size: their number.
        environment: what tells them of each other.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(size):
            place = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, str(RANK), str(folder)]
            ranks.append(subprocess.Popen(command, env=launcher_environment() | place, start_new_session=True))
        while None in (codes := [process.poll() for process in ranks]) and not any(codes):
            time.sleep(0.05)
        return codes
    finally:
        for process in ranks:
            if process.poll() is None:
                end_group(process.pid)
                process.wait()


def _devices() -> list[str]:
    """Name the GPUs of this machine, as CUDA_VISIBLE_DEVICES does; none on a CPU, where each rank is a process."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()  # a name among them may be of no GPU
    return visible[:count] or [str(index) for index in range(count)]


def _checkpoint_before(run_dir: Path, step: int) -> Path | None:
    """Find where the steps before one go on from; None for the run's first step.

    Raises:
        BadInput: the run began elsewhere, and what it began from is not there or is of a later step.
    """
    checkpoints = below(run_dir)
    if before := [path for path in checkpoints if (step_of(path) or 0) < step]:
        return before[0]
    origin = resume.origin_of(checkpoints)
    if origin is not None and (step_of(Path(origin)) or step) < step and Path(origin).is_dir():
        return Path(origin)
    first = next((one["step"] for one in _recorded(run_dir)), 1)
    if origin is None and first <= 1:
        return None
    began = f"began with step {first:,}" + (f" from {origin}, which is not there" if origin else "")
    later = f"; a step after {step_of(checkpoints[-1]):,}, its first checkpoint, would work" if checkpoints else ""
    raise BadInput([f"--step={step}: the run {began}, and there is no checkpoint before this step{later}"])


def _replicas(start: Path | None, config: Config) -> int | None:
    """Read from a checkpoint how many replicas there were, where the settings leave it to the processes."""
    if config.parallel.dp is not None or start is None:
        return None
    try:
        layout = manifest.read(start).layout
    except Damaged:
        return None
    alike = (layout.get("pp"), layout.get("tp")) == (config.parallel.pp, config.parallel.tp)
    return layout.get("dp") if alike else None


def _recorded(run_dir: Path) -> list[dict[str, Any]]:
    return [with_nan(record) for record in records(run_dir / METRICS)]


def _as_text(request: Request, found: Found, of_run: dict[int, tuple[float, float]], verdict: Verdict) -> Sequence[str]:
    begins = f"from {request.start}" if request.start else "from the first step"
    lines = [
        f"step {request.step:,} of {request.run_dir}, computed {request.repeats} times in each of {request.placements} "
        f"placements of {request.layout.world_size} ranks, {begins}"
    ]
    if request.step in of_run:
        lines.append(f"recorded                loss {of_run[request.step][0]!r}  norm {of_run[request.step][1]!r}")
    results: dict[tuple[float, float], set[str]] = {}
    for one in found.attempts:
        results.setdefault((one.loss, one.grad_norm), set()).add(one.device)
    lines += [f"computed again          loss {loss!r}  norm {norm!r}" for loss, norm in results]
    replay = found.replays[0]
    other = [step for step, *figures in replay if step in of_run and not same(of_run[step], figures)]
    if replay:
        span = f"steps {replay[0][0]:,} to {replay[-1][0]:,} before it"
        lines.append(f"{span}: {f'other than recorded from step {other[0]:,} on' if other else 'as recorded'}")
    lines += verdict.lines
    first, last = found.samples
    if not verdict.hardware and request.start is not None:
        lines.append(
            f"its batch is samples {first} to {last} of the order: resume={request.start} with train.skip_steps="
            f"[{request.step}] or train.skip_samples_at=[{first}-{last}] passes over it"
        )
    return lines
