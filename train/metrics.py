"""What a step cost, in the units people compare: model FLOPs utilisation, memory."""

import resource
import sys

import torch

# Dense bf16 peak without sparsity, FLOP/s, from the makers' data sheets; looked up by what the driver calls the device.
PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "MI300X": 1307e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it is not known (the CPU among them)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in PEAK_BF16_FLOPS if key in name]
    return PEAK_BF16_FLOPS[max(known, key=len)] if known else None


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held so far: by the allocator on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory_by_stage(device: torch.device, stage: int, num_stages: int) -> list[float]:
    """GiB that this rank has held, at the place of its stage among zeros: the highest over ranks is each stage's."""
    return [peak_memory(device) / 2**30 if index == stage else 0.0 for index in range(num_stages)]
