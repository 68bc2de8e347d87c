"""The learning rate as a function of how far training is: nothing to save, nothing to restore."""

import math

from conf.schema import Config
from conf.train_settings import Decay, ScheduleConfig
from train.length import Length


def warnings(config: Config, length: Length) -> list[str]:
    """Warn of a run that ends before its learning rate has reached the peak, in a sentence."""
    warmup, steps = config.schedule.warmup_steps, length.steps
    if warmup <= steps:
        return []
    key = length_key(config, length)
    return [
        f"schedule.warmup_steps={warmup}: longer than the run ({key}), whose {steps:,} steps end at "
        f"{steps / warmup:.1%} of optimizer.lr={config.optimizer.lr:g}; {steps} or fewer would reach it"
    ]


def length_key(config: Config, length: Length) -> str:
    """Write the setting that decides how long a run is."""
    train = config.train
    limited = train.max_steps == length.steps
    return f"train.max_steps={length.steps}" if limited else f"train.total_tokens={train.total_tokens:g}"


def rate_share(step: int, length: Length, settings: ScheduleConfig) -> float:
    """Compute the share of the peak learning rate that a step uses.

    Args:
        step: its number, from 1 to length.schedule_steps.
        length: of the run.
        settings: of the schedule.

    Warm-up rises linearly by steps and reaches the peak at step `warmup_steps`. Then, with p the share of all tokens
    that was trained on before this step:

    - multi_step: 1, then `step_to[i]` from p = `step_at[i]` on (0.316 from 0.8, 0.1 from 0.9 in the paper);
    - cosine: from 1 at the end of warm-up to `final` at p = 1;
    - wsd: 1 until p = 1 - `decay_share`, then a straight line to `final` at p = 1.
    """
    if step <= settings.warmup_steps:
        return step / settings.warmup_steps
    progress = length.progress(step)
    if settings.decay is Decay.multi_step:
        share = 1.0
        for at, to in zip(settings.step_at, settings.step_to, strict=True):
            if progress >= at:
                share = to
        return share
    if settings.decay is Decay.cosine:
        warm = min(length.tokens_after(settings.warmup_steps) / length.tokens, 1.0)
        done = (progress - warm) / (1 - warm) if warm < 1 else 1.0
        return settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * done))
    if settings.decay is Decay.wsd:
        if settings.decay_share == 0 or progress < 1 - settings.decay_share:
            return 1.0
        done = (progress - (1 - settings.decay_share)) / settings.decay_share
        return 1.0 + (settings.final - 1.0) * done
    raise NotImplementedError(f"schedule.decay={settings.decay.name}: rate_share has no branch for it")
