"""Text sampled from a model that lies in stages: when training ends, and after steps that are asked for."""

import logging
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from conf.train_settings import SampleConfig
from model.config import ModelConfig
from model.generate import Sampling, complete
from parallel.engine import Engine
from parallel.heartbeat import Phase, heart
from train.data.tokenizer import Encoder
from train.length import is_due

if TYPE_CHECKING:
    from train.run import Run


def sample_text(
    engine: Engine, model: ModelConfig, tokenizer: Tokenizer, eos_id: int, settings: SampleConfig, seed: int
) -> list[str]:
    """Complete each prompt, on every rank. All ranks call it together.

    A continuation stops at the end-of-document token, at `settings.tokens` tokens, or where the context is full.

    Returns:
        Each prompt with its continuation.
    """
    encoder = Encoder(tokenizer)  # a prompt that spells a special token is text
    prompts = [[eos_id, *encoder.encode(text)][: model.max_seq_len - 1] for text in settings.prompts]
    longest = max(map(len, prompts))
    num_tokens = min(settings.tokens, model.max_seq_len - longest)
    with engine.decoder(prompts, longest + num_tokens) as decoder:
        made = complete(decoder, num_tokens, [eos_id], Sampling(temperature=settings.temperature, seed=seed))
    return [tokenizer.decode([*prompt[1:], *row]) for prompt, row in zip(prompts, made, strict=True)]


def samples_after(settings: SampleConfig, step: int) -> bool:
    """Tell whether text is sampled after a step that is not the last."""
    return is_due(step, settings.every_steps, settings.at)


def draw(run: "Run", step: int) -> list[str]:
    """Sample text after a step, if there is any to sample, and keep it. All ranks call it together.

    Returns:
        Each prompt with its continuation; none where that has failed, which is said, and ends nothing.
    """
    sample, data = run.config.sample, run.prepared.data
    if not (sample.tokens and sample.prompts):
        return []
    heart.at(Phase.SAMPLE)
    try:
        texts = sample_text(run.engine, run.config.model, data.tokenizer(), data.eos_id, sample, run.config.train.seed)
    except Exception as error:
        run.say(f"no samples: {type(error).__name__}: {error}", logging.WARNING)
        return []
    if run.tracker:
        run.tracker.samples(step, sample.prompts, texts)
    return texts


def said(texts: list[str], of: str = "") -> list[str]:
    """Set samples for the terminal and the log."""
    return [f"--- sample {number}{of} ---\n{text}" for number, text in enumerate(texts, 1)]
