"""Weights in memory, drawn and then changed by hand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from model.batch import Batch
from model.config import ModelConfig
from model.init import initial_value
from model.transformer import full_shapes

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Made:
    """A model's weights: initial ones, of which those whose names end with a key of `changes` are changed."""

    config: ModelConfig
    changes: Mapping[str, Change] = field(default_factory=dict)
    std: float = 0.3

    def read(self, name: str) -> torch.Tensor:
        weight = initial_value(name, full_shapes(self.config)[name], 1, self.std)
        for end, change in self.changes.items():
            if name.endswith(end):
                weight = change(weight)
        return weight


def held_out(rows: int, length: int, vocab_size: int = 300, seed: int = 0) -> Batch:
    """Rows of random tokens, one document each."""
    drawn = torch.randint(vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous())
