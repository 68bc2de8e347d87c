"""Text sampled from a model that lies in stages."""

from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from conf.settings import SampleConfig
from model.config import ModelConfig
from model.generate import Sampling, drawing
from parallel.forward import next_token_logits

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


def sample_text(
    engine: "PipelineEngine", model: ModelConfig, tokenizer: Tokenizer, eos_id: int, settings: SampleConfig, seed: int
) -> list[str]:
    """Each prompt with its continuation, on every rank. All ranks call it together.

    A continuation stops at the end-of-document token, at `settings.tokens` tokens, or where the context is full.
    """
    prompts = [[eos_id, *tokenizer.encode(text).ids][: model.max_seq_len - 1] for text in settings.prompts]
    longest = min(max(map(len, prompts)) + settings.tokens, model.max_seq_len)
    tokens_BL = torch.full((len(prompts), longest), eos_id, device=engine.device)
    for row, prompt in zip(tokens_BL, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    lengths = [len(prompt) for prompt in prompts]
    done = [False] * len(prompts)
    draw = drawing(Sampling(temperature=settings.temperature, seed=seed))  # the same on every rank
    for _ in range(settings.tokens):
        room = max(lengths)
        logits_BV = next_token_logits(
            engine, model, tokens_BL[:, :room], torch.tensor(lengths, device=engine.device)
        ).cpu()
        for i, token in enumerate(draw(logits_BV).tolist()):
            done[i] = done[i] or token == eos_id or lengths[i] == longest
            if not done[i]:
                tokens_BL[i, lengths[i]] = token
                lengths[i] += 1
        if all(done):
            break
    return [tokenizer.decode(row[1:n].tolist()) for row, n in zip(tokens_BL.cpu(), lengths, strict=True)]
