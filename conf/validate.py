"""Validation of a configuration: one sentence per problem, with the key, the value and what would work."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from conf import alert_settings, eval_settings, launch_settings, mixtures
from conf.paths import name_problems
from conf.ranges import ranges_of
from conf.schema import Config
from conf.train_settings import corpora
from model.problems import not_utf8
from parallel import layout
from parallel.layout import Layout


@dataclass(frozen=True)
class Machine:
    """The hardware and processes that a run is to be started on.

    Attributes:
        gpus: of this host; 0 where it has none.
        local_processes: already started on this host by a launcher; None before launching.
        processes: started in all; None before launching.
        elsewhere: nothing is started here, and how many replicas there will be is not known.
        gpu_bytes: the memory of its smallest GPU; None where nothing tells.
    """

    gpus: int
    local_processes: int | None = None
    processes: int | None = None
    elsewhere: bool = False
    gpu_bytes: int | None = None


def validate(config: Config, machine: Machine) -> tuple[Layout | None, list[str]]:
    """Validate a configuration; the run's layout, None where there cannot be one, and every problem found."""
    parallel, run_layout = config.parallel, None
    cut = layout.problems(parallel, config.model)
    problems = config.model.problems() + cut
    if parallel.pp >= 1 and parallel.tp >= 1 and (parallel.dp is None or parallel.dp >= 1):
        found = _devices(config, machine)
        try:
            run_layout = layout.layout_for(parallel, machine.processes or _processes(config, machine))
        except ValueError as error:
            found.append(str(error))
        if not cut:  # a cut that the model does not allow is not worth counting processes for
            problems += found
    problems += name_problems("name", config.name) + _text(config)
    problems += mixtures.source_problems(config) + mixtures.batch_problems(config, run_layout)
    problems += _lengths(config) + range_problems(config) + _guards(config) + _recipe(config) + _checkpoint(config)
    problems += launch_settings.problems(config.launch) + eval_settings.problems(config.eval, corpora(config.data))
    problems += alert_settings.problems(config.alerts) + _wandb(config)
    problems += [] if machine.elsewhere or machine.gpus else _kernels(config)
    if run_layout and not (machine.elsewhere and parallel.dp is None):
        problems += _profile(config, run_layout)
    return run_layout, problems


def warnings(config: Config, layout: Layout, machine: Machine) -> list[str]:
    """Warn of settings that work and may not be what was meant, in one sentence each."""
    found = []
    if machine.local_processes and machine.local_processes % layout.tp:
        found.append(
            f"parallel.tp={layout.tp}: {machine.local_processes} processes on each machine split some tensor-parallel "
            "groups over machines, where every block waits for the network; a tp that divides them is faster"
        )
    if config.parallel.sequence_parallel and layout.tp == 1:
        found.append("parallel.sequence_parallel=true: ignored, it needs parallel.tp above 1")
    longest = max([stage.seq_len or config.train.seq_len for stage in config.data.stages] or [config.train.seq_len])
    if config.model.window is not None and config.model.window >= longest:
        found.append(
            f"model.window={config.model.window}: no sequence of the run is longer than {longest} tokens, so that it "
            "trains as without a window; a smaller one, or a larger train.seq_len, would be felt"
        )
    return found + mixtures.warnings(config)


def _processes(config: Config, machine: Machine) -> int:
    """Count the processes to start here: what the layout asks for, else every GPU, else one pipeline."""
    pipeline = config.parallel.pp * config.parallel.tp
    return pipeline * (config.parallel.dp or max(1, machine.gpus // pipeline))


def _devices(config: Config, machine: Machine) -> list[str]:
    asked = machine.local_processes or _processes(config, machine)
    if not machine.gpus or asked <= machine.gpus:
        return []
    if machine.local_processes:
        return [
            f"--num_gpus={asked}: {asked} processes were started on this host, and it has {machine.gpus} GPUs; "
            f"--num_gpus={machine.gpus} works"
        ]
    sizes = {key: getattr(config.parallel, key) for key in ("pp", "tp", "dp")}
    asks = " ".join(f"parallel.{key}={size}" for key, size in sizes.items() if size and size > 1)
    return [
        f"{asks}: the layout asks for {asked} processes and this machine has {machine.gpus} GPUs; "
        f"pp x tp x dp <= {machine.gpus} works here, and the deepspeed launcher's --hostfile takes more machines"
    ]


def _lengths(config: Config) -> list[str]:
    train = config.train
    problems = mixtures.seq_len_problems("train.seq_len", train.seq_len, config) if train.seq_len >= 1 else []
    problems += mixtures.stage_problems(config) + mixtures.total_problems(config)
    if train.max_steps is not None and train.max_steps < 1:
        problems.append(f"train.max_steps={train.max_steps}: must be at least 1, or null for the whole run")
    if train.max_skipped is not None and train.max_skipped < 1:
        problems.append(f"train.max_skipped={train.max_skipped}: must be at least 1, or null for no limit")
    if train.skip_samples < 0:
        problems.append(f"train.skip_samples={train.skip_samples}: must be at least 0")
    if train.val_every < 0:
        problems.append(f"train.val_every={train.val_every}: must be at least 1, or 0 to validate only at the end")
    if train.log_every is not None and train.log_every < 1:
        problems.append(f"train.log_every={train.log_every}: must be at least 1, or null for a line a minute")
    for key in ("val_at", "timeline_at", "profile"):
        if any(step < 1 for step in getattr(train, key)):
            problems.append(f"train.{key}={getattr(train, key)}: steps count from 1")
    if config.sample.every_steps is not None and config.sample.every_steps < 1:
        problems.append(
            f"sample.every_steps={config.sample.every_steps}: must be at least 1, or null to sample at the end alone"
        )
    if any(step < 1 for step in config.sample.at):
        problems.append(f"sample.at={config.sample.at}: steps count from 1")
    if config.sample.tokens < 0:
        problems.append(f"sample.tokens={config.sample.tokens}: must be at least 1, or 0 to sample nothing")
    if not 0 <= config.sample.temperature < math.inf:
        problems.append(
            f"sample.temperature={config.sample.temperature}: must be 0 (the likeliest token) or above, and finite"
        )
    return problems


def range_problems(config: Config) -> list[str]:
    """Find steps and samples to pass over that are no numbers or ranges, or that no run has."""
    problems = []
    for key, least in (("skip_steps", 1), ("skip_samples_at", 0)):
        value = getattr(config.train, key)
        try:
            ranges = ranges_of(value)
        except ValueError as error:
            problems.append(f"train.{key}={value}: {error}")
        else:
            if ranges and ranges[0].start < least:
                problems.append(f"train.{key}={value}: steps count from 1")
    return problems


def _guards(config: Config) -> list[str]:
    train = config.train
    problems = []
    for key, instead in (("spike_sigmas", "to skip no spike"), ("straggler_percent", "to measure nothing")):
        value = getattr(train, key)
        if value is not None and not 0 < value < math.inf:
            problems.append(f"train.{key}={value}: must be above 0 and finite, or null {instead}")
    if train.straggler_steps < 2:
        problems.append(f"train.straggler_steps={train.straggler_steps}: must be at least 2, such as 50")
    return problems


def _wandb(config: Config) -> list[str]:
    seconds = config.wandb.finish_seconds
    if 0 < seconds < math.inf:
        return []
    return [f"wandb.finish_seconds={seconds}: not a time above 0; 120 would work"]


def _text(config: Config) -> list[str]:
    """Find text that has no UTF-8 form."""
    return [problem for key, value in _leaves("", asdict(config)) for problem in not_utf8(key, value)]


def _leaves(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield all text of nested settings, with the key that it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}" if key else name, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(key, inner)


def _kernels(config: Config) -> list[str]:
    """Find kernels that were asked for by name and run on GPUs, on a machine that has none."""
    model = config.model
    return [
        f"model.{key}={way.name}: runs on GPUs, and this machine has none; model.{key}=auto takes what there is"
        for key, way in (("attention", model.attention), ("kernels", model.kernels))
        if way.needs_gpu
    ]


def _profile(config: Config, run_layout: Layout) -> list[str]:
    ranks, size = config.train.profile_ranks, run_layout.world_size
    if all(0 <= rank < size for rank in ranks):
        return []
    works = f"0 to {size - 1} are those of {run_layout}" if size > 1 else "a run of one process has rank 0"
    return [f"train.profile_ranks={ranks}: {works}"]


def _recipe(config: Config) -> list[str]:
    problems = []
    adam, schedule = config.optimizer, config.schedule
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(adam, key) < 1:
            problems.append(f"optimizer.{key}={getattr(adam, key)}: must be at least 0 and below 1")
    for key, least in (("lr", "above 0"), ("eps", "above 0"), ("weight_decay", "at least 0")):
        value = getattr(adam, key)
        if not (0 < value < math.inf or (least == "at least 0" and value == 0)):
            problems.append(f"optimizer.{key}={value}: must be {least} and finite")
    if adam.clip is not None and not adam.clip > 0:
        problems.append(f"optimizer.clip={adam.clip}: must be above 0, or null to clip nothing")
    if schedule.warmup_steps < 0:
        problems.append(f"schedule.warmup_steps={schedule.warmup_steps}: must be at least 0")
    if len(schedule.step_at) != len(schedule.step_to):
        problems.append(
            f"schedule.step_at={schedule.step_at}: has {len(schedule.step_at)} drops and schedule.step_to="
            f"{schedule.step_to} has {len(schedule.step_to)}; both need equally many"
        )
    if sorted(schedule.step_at) != list(schedule.step_at) or any(not 0 <= at <= 1 for at in schedule.step_at):
        problems.append(f"schedule.step_at={schedule.step_at}: must rise from 0 to 1, such as [0.8,0.9]")
    for key in ("final", "decay_share"):
        if not 0 <= getattr(schedule, key) <= 1:
            problems.append(f"schedule.{key}={getattr(schedule, key)}: must be between 0 and 1")
    return problems


def _checkpoint(config: Config) -> list[str]:
    settings = config.checkpoint
    problems = []
    if settings.every_minutes is not None and not 0 < settings.every_minutes < math.inf:
        problems.append(
            f"checkpoint.every_minutes={settings.every_minutes}: must be above 0, or null not to save by time"
        )
    for key, instead in (
        ("every_steps", ", or null not to save by steps"),
        ("keep_every", ", or null"),
        ("keep_last", ""),
    ):
        value = getattr(settings, key)
        if value is not None and value < 1:
            problems.append(f"checkpoint.{key}={value}: must be at least 1{instead}")
    return problems
