"""The cost of a save: the seconds that it blocks training in the background, and those of one that is waited for."""

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from conf.schema import Config, to_jsonable
from conf.train_settings import CheckpointConfig
from launch.bench.common import composed, device_name
from model.batch import Batch
from parallel.engine import Engine, EngineSettings, build_engine
from parallel.layout import Layout
from parallel.stages import split
from parallel.state import OptimizerState
from train.agreement import checkpoint_group
from train.checkpoint.saver import Saver
from train.optimizer import adamw
from train.pretrain import stand_alone_unless_launched

DEFAULTS = ["model=12x768", "model.vocab_size=32000", "model.max_seq_len=256", "train.seq_len=256"]
"""The default overrides: 134 million parameters, and steps of seconds on a CPU."""


def measure(overrides: Sequence[str], rounds: int = 5) -> dict[str, Any]:
    """Save one process's model in the background and while training waits, by turns; return the medians of both.

    Args:
        overrides: the overrides of the model, after `DEFAULTS`; files are written beside `hydra.run.dir` and deleted.
        rounds: the number of rounds, with one save of each kind.
    """
    composition = composed(DEFAULTS, overrides)
    config, layout = composition.config, Layout(dp=1, pp=1)
    stand_alone_unless_launched()
    from parallel.deepspeed_engine import start_process_group

    device = start_process_group()
    shape = config.model
    engine = build_engine(
        shape,
        layout,
        split(shape.layer_flops(config.train.seq_len), 1),
        EngineSettings(
            micro_batch=1, accumulation=1, clip=1.0, bf16=device.type == "cuda", seed=1, seq_len=config.train.seq_len
        ),
        partial(adamw, settings=config.optimizer),
    )
    batches = _batches(config)
    times: dict[str, list[float]] = {key: [] for key in ("step", "blocked", "written", "waited", "step_while_saving")}
    home = composition.run_dir.absolute().parent
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix="bench-checkpoint-") as folder:
        saver = _saver(Path(folder), config, layout, OptimizerState(engine.zero))
        num_bytes = 0
        for number in range(-1, rounds):  # the first save allocates the copies, and is not counted
            times["step"] += [_step(engine, batches, config.optimizer.lr)]
            begin = time.perf_counter()
            saver.save(2 * number + 10, tokens=0)
            times["blocked"] += [time.perf_counter() - begin]
            while saver.busy:
                times["step_while_saving"] += [_step(engine, batches, config.optimizer.lr)]
            outcome = saver.wait()
            assert outcome is not None and outcome.error is None, outcome
            times["written"] += [outcome.seconds]
            _step(engine, batches, config.optimizer.lr)
            begin = time.perf_counter()
            saver.save(2 * number + 11, tokens=0)
            outcome = saver.wait()
            times["waited"] += [time.perf_counter() - begin]
            assert outcome is not None and outcome.error is None, outcome
            num_bytes = outcome.num_bytes
            if number < 0:
                first_blocked = times["blocked"][0]
                times = {key: [] for key in times}
    median = {key: statistics.median(values) for key, values in times.items() if values}
    return {
        "parameters": shape.num_params,
        "device": device_name(device),
        "seconds": {**median, "first_blocked": first_blocked},
        "blocked_share": median["blocked"] / median["waited"],
        "bytes_per_parameter": num_bytes / shape.num_params,
    }


def as_text(found: dict[str, Any]) -> str:
    """Render the results of `measure` as text."""
    seconds = found["seconds"]
    lines = [
        f"{found['parameters']:,} parameters on {found['device']}",
        f"blocked by a save in the background   {seconds['blocked']:.3f} s (the first, which allocates: "
        f"{seconds['first_blocked']:.3f} s)",
        f"blocked by a save that is waited for  {seconds['waited']:.3f} s",
        f"ratio                                 {found['blocked_share']:.3f}",
        f"in the background until on disk       {seconds['written']:.3f} s",
        f"a step, undisturbed                   {seconds['step']:.3f} s",
    ]
    if "step_while_saving" in seconds:
        lines.append(f"a step while a save is written        {seconds['step_while_saving']:.3f} s")
    lines.append(f"on disk                               {found['bytes_per_parameter']:.3f} bytes per parameter")
    return "\n".join(lines)


def _saver(folder: Path, config: Config, layout: Layout, state: OptimizerState) -> Saver:
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text("{}")
    settings = CheckpointConfig(keep_last=1)
    facts = {"data": "", "config": to_jsonable(asdict(config)), "layout": asdict(layout), "code": "", "origin": None}
    return Saver(state, folder / "checkpoints", settings, facts, tokenizer, checkpoint_group())


def _step(engine: Engine, batches: Iterator[Batch], rate: float) -> float:
    begin = time.perf_counter()
    engine.step(batches, rate)
    return time.perf_counter() - begin


def _batches(config: Config) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    while True:
        rows = torch.randint(config.model.vocab_size, (1, config.train.seq_len + 1), generator=generator)
        yield Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
