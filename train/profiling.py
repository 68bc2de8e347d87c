"""Profiles of a step: a trace of one rank's operators for Perfetto, and a snapshot of a GPU's memory."""

import gzip
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from parallel.heartbeat import Phase, heart
from train import strict_json
from train.records import PROFILES


@contextmanager
def profiled(
    run_dir: Path, step: int, rank: int, device: torch.device, say: Callable[[str, int], object]
) -> Iterator[None]:
    """Trace what is done meanwhile, and keep it in the run folder as this rank's part of a step.

    ``profiles/step-00000010-rank-0.json.gz`` opens in Perfetto: operators with the shapes of their inputs, the passes
    of the pipeline by name, and at each allocation the bytes held, on the CPU of those since the trace began. With a
    GPU, ``….memory.pickle`` beside it is a snapshot for pytorch.org/memory_viz, with what was allocated and freed.

    A disk that cannot take them, or a profiler that fails, ends nothing: that is said. What is raised meanwhile passes,
    and leaves no file.

    Args:
        run_dir: the run folder, shared by all ranks.
        step: its number.
        rank: this process's, global.
        device: of this rank.
        say: to be told where the trace is, or why there is none, with a level of `logging`.
    """
    path = run_dir / PROFILES / f"step-{step:08d}-rank-{rank}.json.gz"
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    try:
        if on_gpu:
            torch.cuda.memory._record_memory_history(stacks="python")
        trace = profile(activities=activities, record_shapes=True, profile_memory=True)
        trace.start()
    except Exception as error:
        say(f"step {step} on rank {rank} could not be profiled ({error})", logging.WARNING)
        yield
        return
    try:
        try:
            yield
            heart.at(Phase.KEEP)  # all ranks wait, for minutes where the trace is long
        finally:
            failure = _stopped(trace)
        try:
            if failure is not None:
                raise failure
            write(path, trace, on_gpu=on_gpu)
        except Exception as error:  # of the disk, or of what others write
            say(f"the profile of step {step} on rank {rank} could not be kept ({error})", logging.WARNING)
        else:
            say(f"profile of step {step} on rank {rank}: {path}", logging.INFO)
    finally:
        if on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)


def _stopped(trace: profile) -> Exception | None:
    """Stop a trace, and return what that failed with."""
    try:
        trace.stop()
    except Exception as error:
        return error
    return None


def write(path: Path, trace: profile, *, on_gpu: bool) -> None:
    """Keep a trace, and the snapshot of the GPU's memory beside it; neither has its name before it is whole.

    Args:
        path: ending in .json.gz; its folder is made.
        trace: that has ended; it can be written once.
        on_gpu: whether there is such a snapshot.

    Raises:
        OSError: the disk does not take them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.removesuffix(".json.gz")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{name}-", ignore_cleanup_errors=True) as folder:
        # Given a name in .gz, torch would go through /tmp, which may be small, and pack whatever has arrived there.
        whole, packed = Path(folder, f"{name}.json"), Path(folder, path.name)
        trace.export_chrome_trace(str(whole))
        try:
            found = json.loads(whole.read_bytes())
        except (FileNotFoundError, ValueError) as error:  # torch raises nothing where a disk is full
            raise OSError(f"torch's profiler wrote no whole trace: {error}") from error
        found["traceEvents"] = list(messages_aside(found["traceEvents"]))
        with gzip.open(packed, "wb", compresslevel=6) as file:  # of 9: all ranks wait
            file.write(strict_json.dumps(found).encode())
        if on_gpu:
            snapshot = Path(folder, f"{name}.memory.pickle")
            torch.cuda.memory._dump_snapshot(str(snapshot))
            snapshot.replace(path.with_name(snapshot.name))
        packed.replace(path)


def messages_aside(events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Move Gloo's messages in the events of a trace to tracks of their own.

    They are under way while their thread does other things, and written as if it did nothing else: of two that overlap
    on a track, Perfetto drops one, which may be a pass of the pipeline.
    """
    for number, event in enumerate(events):
        if event.get("ph") == "X" and event["name"].startswith("gloo:"):
            end = event["ts"] + event["dur"]
            begun = {key: value for key, value in event.items() if key != "dur"} | {"ph": "b", "id": number}
            yield begun
            yield {key: value for key, value in begun.items() if key != "args"} | {"ph": "e", "ts": end}
        else:
            yield event
