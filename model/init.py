"""Initial weights, each drawn from (seed, its own full name): the same numbers in every layout."""

import hashlib

import torch
from torch import nn


@torch.no_grad()
def initialise(module: nn.Module, prefix: str, seed: int, std: float) -> None:
    """Fill the parameters of `module` in place: norm weights with 1, matrices from a normal of mean 0 and `std`.

    Args:
        module: a layer or a whole model, on any device, in any dtype.
        prefix: is put before the names of its parameters to give their full names, such as ``"blocks.17."``; ``""``
            for a whole model.
        seed: the run's seed.
        std: in the paper 0.006 for every matrix (arXiv 2401.02954, section 2.3).
    """
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_value(prefix + name, parameter.shape, seed, std))


def initial_value(
    name: str, shape: torch.Size, seed: int, std: float, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The initial value of one parameter, fp32. Runs draw it on the CPU whatever trains it: GPUs draw other numbers."""
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.empty(shape, device=device).normal_(0.0, std, generator=generator)
