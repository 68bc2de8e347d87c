"""The learning rate as a function of how far training is: nothing to save, nothing to restore."""

import math
from dataclasses import dataclass

from conf.schema import Config
from conf.train_settings import Decay, ScheduleConfig


@dataclass(frozen=True)
class Length:
    """The length of a run in steps and tokens.

    Attributes:
        tokens_per_step: train.global_batch x train.seq_len.
        schedule_steps: steps that train.total_tokens make, rounded up; the schedule is spread over them.
        steps: steps to run: schedule_steps, or train.max_steps where that is less.
    """

    tokens_per_step: int
    schedule_steps: int
    steps: int


def length_of(config: Config) -> Length:
    """Compute the length that a configuration asks for."""
    tokens_per_step = config.train.global_batch * config.train.seq_len
    schedule_steps = math.ceil(config.train.total_tokens / tokens_per_step)
    steps = min(schedule_steps, config.train.max_steps or schedule_steps)
    return Length(tokens_per_step, schedule_steps, steps)


def warnings(config: Config, num_sequences: int) -> list[str]:
    """Warn of a length that may not be what was meant, in one sentence each.

    Args:
        config: of the run.
        num_sequences: that the corpus has to train on.
    """
    train, warmup, steps = config.train, config.schedule.warmup_steps, length_of(config).steps
    key = f"train.max_steps={steps}" if train.max_steps == steps else f"train.total_tokens={train.total_tokens:g}"
    samples, found = steps * train.global_batch, []
    if samples - num_sequences >= train.global_batch or train.global_batch > num_sequences:
        found.append(
            f"{key}: {samples / num_sequences:.1f} epochs, since {steps:,} steps of train.global_batch="
            f"{train.global_batch} take {samples:,} sequences and the corpus has {num_sequences:,} of train.seq_len="
            f"{train.seq_len}; a larger corpus or a shorter run repeats less"
        )
    if warmup > steps:
        found.append(
            f"schedule.warmup_steps={warmup}: longer than the run ({key}), whose {steps:,} steps end at "
            f"{steps / warmup:.1%} of optimizer.lr={config.optimizer.lr:g}; {steps} or fewer would reach it"
        )
    return found


def rate_share(step: int, num_steps: int, settings: ScheduleConfig) -> float:
    """Compute the share of the peak learning rate that step number `step` (from 1 to `num_steps`) uses.

    Warm-up rises linearly and reaches the peak at step `warmup_steps`. Then, with p = (step - 1) / num_steps the share
    of the tokens seen before this step:

    - multi_step: 1, then `step_to[i]` from p = `step_at[i]` on (0.316 from 0.8, 0.1 from 0.9 in the paper);
    - cosine: from 1 at the end of warm-up to `final` at p = 1;
    - wsd: 1 until p = 1 - `decay_share`, then a straight line to `final` at p = 1.
    """
    if step <= settings.warmup_steps:
        return step / settings.warmup_steps
    progress = (step - 1) / num_steps
    if settings.decay is Decay.multi_step:
        share = 1.0
        for at, to in zip(settings.step_at, settings.step_to, strict=True):
            if progress >= at:
                share = to
        return share
    if settings.decay is Decay.cosine:
        warm = min(settings.warmup_steps / num_steps, 1.0)
        done = (progress - warm) / (1 - warm) if warm < 1 else 1.0
        return settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * done))
    if settings.decay_share == 0 or progress < 1 - settings.decay_share:
        return 1.0
    done = (progress - (1 - settings.decay_share)) / settings.decay_share
    return 1.0 + (settings.final - 1.0) * done
