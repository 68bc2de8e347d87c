"""Run folders as a run leaves them, without the run: records that a formula makes, and what else is in a folder."""

import json
import math
from pathlib import Path

import yaml

from parallel.schedules import Placement, Schedule, orders
from parallel.simulation import Costs, simulate
from train import timeline

SETTINGS = {
    "preset": "tiny",
    "name": "one",
    "model": {"n_layers": 8, "d_model": 128, "n_heads": 4, "n_kv_heads": 2},
    "optimizer": {"lr": 3e-3},
    "parallel": {"pp": 2, "tp": 1, "dp": None, "schedule": "1f1b"},
}


def record(step, tokens_a_step=2048, **further):
    """The record of a step of two stages that takes half a second."""
    tokens = tokens_a_step * step
    return {
        "step": step,
        "loss": 4 + 4 / step,
        "grad_norm": 1 + 1 / step,
        "lr": 3e-3,
        "tokens": tokens,
        "seconds": 0.5,
        "tokens_per_second": 2 * tokens_a_step,
        "memory_gib": [1.5, 1.25],
        "forward_seconds": [0.1, 0.125],
        "backward_seconds": [0.2, 0.25],
        "wait_seconds": [0.1, 0.025],
        "bubble": 0.15,
        "bubble_expected": 0.11,
        "optimizer_seconds": 0.1,
        "source_tokens": {"web": 3 * tokens // 4, "code": tokens // 4},
        **further,
    }


def records(count, every=10):
    """The records of a run that validates now and then, and saves as often."""
    for step in range(1, count + 1):
        measured = {}
        if step % every == 0:
            loss = 4 + 4 / step
            sets = {name: {"loss": loss + 0.1 * i, "bits_per_byte": loss / 3} for i, name in enumerate(("web", "code"))}
            measured = {"val_loss": loss, "val_sets": sets, "tasks": {"own": {"accuracy": 0.25 + step / count / 2}}}
            measured |= {"eval_seconds": 0.25, "save_blocked_seconds": 0.01, "save_seconds": 1.5, "save_gib": 0.03}
        yield record(step, **measured)


def write_run(folder: Path, made, settings=SETTINGS, **files) -> Path:
    """Write a run folder: its records, its settings, and further files of JSON lines or an object by name."""
    folder.mkdir(parents=True)
    lines = (one if isinstance(one, str) else json.dumps(one) for one in made)
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if settings:
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(settings))
    for name, content in files.items():
        name, _, ending = name.rpartition("_")
        listed = content if ending == "jsonl" else [content]
        (folder / f"{name}.{ending}").write_text("".join(json.dumps(one) + "\n" for one in listed))
    return folder


def write_timeline(folder: Path, step: int, micro_batches=4) -> timeline.MeasuredStep:
    """Keep the timeline of a step in a run folder, without its picture."""
    placement = Placement(2, 1)
    order = orders(Schedule["1f1b"], placement, micro_batches)
    spans = simulate(order, placement, Costs([0.01, 0.012], [0.02, 0.024], [0.0, 0.0])).spans
    measured = timeline.MeasuredStep(step, Schedule["1f1b"], placement, micro_batches, spans)
    path = folder / timeline.TIMELINES / f"step-{step:08d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(measured.as_json()))
    return measured


SKIPPED = {
    "step": 40,
    "reason": "loss",
    "why": "its loss of 9 is above 5",
    "loss": 9.0,
    "grad_norm": math.pi,
    "samples": [[320, 327]],
}
FAILED = {
    "time": "2026-01-02T03:04:05+00:00",
    "event": "failed",
    "cause": "was killed by SIGKILL",
    "rank": 1,
    "host": "node7",
    "step": 60,
    "restart_in_seconds": 1.0,
}
ALERT = {
    "time": "2026-01-02T03:04:06+00:00",
    "event": "alert",
    "title": "disk nearly full",
    "text": "3.2 GiB are free",
    "level": "WARN",
}
RECOVERED = {
    "time": "2026-01-02T03:05:05+00:00",
    "event": "recovered",
    "cause": "was killed by SIGKILL",
    "step": 60,
    "restarts": 1,
    "seconds": {"lost": 33.0},
}
