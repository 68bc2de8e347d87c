"""Which devices the tests see: a GPU is for those marked `gpu`; the ranks that others start are processes on the CPU.

Several ranks of a test would else meet on one GPU, which NCCL refuses.
"""

import os

import torch

_ASKED = "DEEPNARROW_TESTS_CUDA_VISIBLE_DEVICES"
"""What CUDA_VISIBLE_DEVICES was before it was hidden, for the workers of pytest-xdist; empty for not set."""
if "PYTEST_XDIST_WORKER" in os.environ and _ASKED in os.environ:
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if os.environ[_ASKED]:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ[_ASKED]
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
GPUS = torch.cuda.device_count()


def hide_gpus_from_children() -> None:
    """Have processes that are started from here on run on the CPU; this one keeps its GPUs."""
    if GPUS:
        torch.cuda.init()  # it reads the variable now, and not again
        torch.cuda.device_count()  # which is remembered from here on
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # more are children, which would see none to compile for
    if VISIBLE != "":
        os.environ[_ASKED] = VISIBLE or ""
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")


def environment_with_gpus() -> dict[str, str]:
    """The environment of a process that is to have the GPUs after all."""
    found = {**os.environ, "DS_ACCELERATOR": "cuda"}
    del found["CUDA_VISIBLE_DEVICES"]
    return found if VISIBLE is None else {**found, "CUDA_VISIBLE_DEVICES": VISIBLE}
