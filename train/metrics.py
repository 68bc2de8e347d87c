"""What a device can do at most and what a process has used of it: peak FLOP/s, peak memory."""

import resource
import sys

import torch

# Dense bf16 peak without sparsity, FLOP/s, from the makers' data sheets. The longest key in what the driver calls a
# device counts: an H100 with PCIe or as NVL is slower than the one on SXM.
PEAK_BF16_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800 PCIe": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "MI300X": 1307e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Look up a device's dense bf16 peak in FLOP/s; None where it is not known (the CPU among them)."""
    if device.type != "cuda":
        return None
    known = known_gpu(torch.cuda.get_device_name(device))
    return PEAK_BF16_FLOPS[known] if known else None


def known_gpu(name: str) -> str | None:
    """Return the key of `PEAK_BF16_FLOPS` for what the driver calls a device; None where it is not known."""
    return max((key for key in PEAK_BF16_FLOPS if key in name), key=len, default=None)


def peak_memory(device: torch.device) -> int:
    """Measure the most bytes that this process has held so far: allocated on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
