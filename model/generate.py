"""Text from a model, token by token, with the keys and values of earlier tokens cached.

B sequences, L tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from model.cache import KVCache
from model.context import Context
from model.problems import BadInput
from model.step_graph import StepGraph
from model.transformer import Block, Head


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from its logits.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from so many of the likeliest; None from all.
        top_p: draw from the fewest tokens that together are at least so likely; 1.0 from all.
        seed: of the draws.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 1

    def problems(self) -> list[str]:
        """Every impossible value, one sentence each."""
        found = []
        if not 0 <= self.temperature < float("inf"):
            found.append(f"--temperature={self.temperature}: must be 0 (the likeliest token) or above, and finite")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"--top-k={self.top_k}: must be at least 1")
        if not 0 < self.top_p <= 1:
            found.append(f"--top-p={self.top_p}: must be above 0 and at most 1")
        return found


class Decoder:
    """Runs a batch of sequences through the layers of a model, with a cache for each block.

    Args:
        layers: embedding, blocks and head in order, on one device; or those of them that this process holds
            (`parallel/decode.py`).
        prompts: token ids of each sequence, at least one.
        room: tokens that a sequence may grow to; at most `max_seq_len`.

    Attributes:
        lengths_B: number of tokens of each sequence.
        caches: the caches of the blocks, in order.
    """

    def __init__(self, layers: Sequence[nn.Module], prompts: Sequence[Sequence[int]], room: int):
        weight = next(layers[0].parameters())
        self.lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
        self._layers = [
            (layer, KVCache(self.lengths_B, room, layer.attention.window) if isinstance(layer, Block) else None)
            for layer in layers
        ]
        self.caches = [cache for _, cache in self._layers if cache is not None]
        self._prompts_BL = torch.zeros(len(prompts), int(self.lengths_B.max()), dtype=torch.int64, device=weight.device)
        for row, prompt in zip(self._prompts_BL, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        self._graph = StepGraph(self.caches) if self.lengths_B.is_cuda and self._is_alone() else None

    def prefill(self) -> torch.Tensor:
        """Logits of the token after each prompt, fp32 (B, V)."""
        return self._run(self._prompts_BL, self.lengths_B - 1)

    def step(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Append one token to each sequence, int64 (B,); logits of the token after it, fp32 (B, V)."""
        tokens_B1 = tokens_B.to(self.lengths_B.device).unsqueeze(1)
        logits_BV = self._graph.step(self._one, tokens_B1) if self._graph else self._one(tokens_B1)
        self.lengths_B += 1
        return logits_BV

    def _is_alone(self) -> bool:
        """Whether this process needs no other one for a step."""
        return True

    def _one(self, tokens_B1: torch.Tensor) -> torch.Tensor:
        return self._run(tokens_B1, torch.zeros_like(self.lengths_B))

    @torch.no_grad()
    def _run(self, tokens_BL: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor:
        """The next logits (B, V) after sequences (B, L) whose last token stands at `last_B`."""
        return through(self._layers, tokens_BL, last_B).float()


def through(layers: Sequence[tuple[nn.Module, KVCache | None]], x: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor:
    """Run some of a model's layers, blocks with their caches; a head computes logits at `last_B` only."""
    for layer, cache in layers:
        if isinstance(layer, Head):
            x = x[torch.arange(len(x), device=x.device), last_B]
        x = layer(x) if cache is None else layer(x, Context(cache=cache))
    return x


def generate(
    decoder: Decoder, num_tokens: int, ends: Collection[int], sampling: Sampling
) -> Iterator[list[int | None]]:
    """Generate the next token of each sequence, step by step, until all have ended or `num_tokens` steps are done.

    Args:
        decoder: has seen nothing but its prompts.
        num_tokens: the most tokens of a sequence; prompt and new tokens fit the decoder's room.
        ends: the tokens that end a sequence, which are not yielded; without any, none ends.
        sampling: how tokens are drawn.

    Yields:
        A token for each sequence, None for one that has ended.
    """
    draw = drawing(sampling)
    logits_BV = decoder.prefill()
    ended = [False] * len(logits_BV)
    for step in range(num_tokens):
        tokens_B = draw(logits_BV.cpu())
        ended = [was or token in ends for was, token in zip(ended, tokens_B.tolist(), strict=True)]
        if all(ended):
            return
        yield [None if is_over else token for is_over, token in zip(ended, tokens_B.tolist(), strict=True)]
        if step + 1 < num_tokens:
            logits_BV = decoder.step(tokens_B)


def drawing(sampling: Sampling) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that draws tokens, int64 (B,), from logits (B, V) on the CPU: the same on every device and rank.

    It raises `BadInput` where logits are not finite, of which no token can be drawn.
    """
    generator = torch.Generator().manual_seed(sampling.seed)

    def draw(logits_BV: torch.Tensor) -> torch.Tensor:
        if not logits_BV.isfinite().all():
            raise BadInput(["the model gives logits that are not finite: its weights are not, or they have diverged"])
        if sampling.temperature == 0:
            return logits_BV.argmax(-1)
        sorted_BV, order_BV = (logits_BV / sampling.temperature).sort(dim=-1, descending=True)
        weights_BV = sorted_BV.softmax(-1)
        if sampling.top_k is not None:
            weights_BV[:, sampling.top_k :] = 0
        # A token stays as long as those before it do not reach top_p; the first always does.
        before_BV = weights_BV.cumsum(-1) - weights_BV
        weights_BV[before_BV >= sampling.top_p * weights_BV.sum(-1, keepdim=True)] = 0
        return order_BV.gather(1, torch.multinomial(weights_BV, 1, generator=generator)).squeeze(1)

    return draw


def complete(decoder: Decoder, num_tokens: int, ends: Collection[int], sampling: Sampling) -> list[list[int]]:
    """The tokens that follow each prompt, after `generate` has run to its end."""
    completions: list[list[int]] = [[] for _ in decoder.lengths_B]
    for step in generate(decoder, num_tokens, ends, sampling):
        for row, token in zip(completions, step, strict=True):
            if token is not None:
                row.append(token)
    return completions
