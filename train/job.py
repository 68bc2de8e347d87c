"""The job that a configuration asks for: the settings of its engine, and with its model and layout what is planned."""

from conf.schema import Config
from conf.train_settings import Precision
from parallel.engine import EngineSettings
from parallel.layout import Layout, layout_for
from parallel.plan.job import Job
from train.length import length_of, longest


def engine_settings(config: Config, layout: Layout, *, bf16: bool, global_batch: int) -> EngineSettings:
    """Return the settings of the engine that a sound configuration asks for.

    Args:
        config: of the run.
        layout: the rank grid.
        bf16: whether the stages compute in bf16, else in fp32.
        global_batch: the number of sequences of a step.
    """
    train, parallel = config.train, config.parallel
    return EngineSettings(
        micro_batch=train.micro_batch,
        accumulation=global_batch // (train.micro_batch * layout.dp),
        clip=config.optimizer.clip,
        bf16=bf16,
        seed=train.seed,
        seq_len=longest(config),
        recompute=parallel.recompute,
        head_pieces=parallel.head_pieces,
        schedule=parallel.schedule,
        placement=parallel.placement,
    )


def job_of(config: Config, *, num_processes: int | None = None, on_gpus: bool = True) -> Job:
    """Return the job of the last step of a run, whose batch is the largest of a batch size ramp-up.

    Args:
        config: of the run, sound.
        num_processes: how many there are; None for one replica where parallel.dp is null.
        on_gpus: whether the run is planned for GPUs, which decides what train.precision=auto is.
    """
    parallel = config.parallel
    layout = layout_for(parallel, num_processes or parallel.pp * parallel.tp * (parallel.dp or 1))
    length = length_of(config)
    batch = length.at(length.schedule_steps).global_batch
    bf16 = computes_in_bf16(config, on_gpus=on_gpus)
    settings = engine_settings(config, layout, bf16=bf16, global_batch=batch)
    return Job(config.model, layout, settings, cut_at=config.train.seq_len)


def computes_in_bf16(config: Config, *, on_gpus: bool) -> bool:
    """Tell whether the stages compute in bf16: `train.precision`, which by default goes by the device."""
    asked = config.train.precision
    return asked is Precision.bf16 or (asked is Precision.auto and on_gpus)
