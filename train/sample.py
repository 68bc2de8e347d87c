"""Text sampled from a model that lies in stages."""

from tokenizers import Tokenizer

from conf.train_settings import SampleConfig
from model.config import ModelConfig
from model.generate import Sampling, complete
from parallel.engine import Engine
from train.data.tokenizer import Encoder


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
