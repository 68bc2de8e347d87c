"""What a step cost, in the units people compare: tokens per second, model FLOPs utilisation, memory."""

import resource
import sys

import torch
import torch.distributed as dist

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
    """GiB of each stage's largest rank, on every rank. All ranks call it together."""
    most = torch.zeros(num_stages, dtype=torch.float64, device=device)
    most[stage] = peak_memory(device) / 2**30
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most.tolist()
