"""What several benchmarks need: settings, weights, and how a finding is printed."""

import os
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from conf.compose import Composition, compose_overrides
from conf.errors import BadInput
from conf.validate import Machine, validate
from model.config import ModelConfig
from model.init import initial_value
from model.transformer import full_shapes

SEED, STD = 1, 0.02
"""Of weights that are drawn for a benchmark."""


def composed(defaults: Sequence[str], overrides: Sequence[str]) -> Composition:
    """The settings of a benchmark: its own overrides, then the user's.

    Raises:
        BadInput: with every problem found.
    """
    composition = compose_overrides([*defaults, *overrides])
    if problems := [*composition.problems, *validate(composition.config, Machine(gpus=0))[1]]:
        raise BadInput(problems)
    return composition


class Drawn:
    """A model's weights, drawn one at a time when they are asked for: `model.weights.Weights`.

    Args:
        config: the shape.
        std: of every matrix.
    """

    def __init__(self, config: ModelConfig, std: float = STD):
        self.config, self._std = config, std
        self._shapes = full_shapes(config)

    def read(self, name: str) -> torch.Tensor:
        """A parameter by its full name, fp32 on the CPU: what `model.init.initialise` draws with seed `SEED`."""
        return initial_value(name, self._shapes[name], SEED, self._std)


def device_name(device: torch.device) -> str:
    """What was measured on: the GPU as its driver calls it, or the CPU with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {len(os.sched_getaffinity(0))} cores"


def rendered(table: Table) -> str:
    """A table as plain text without spaces at the ends of lines."""
    console = Console(width=118, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
