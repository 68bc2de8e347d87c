"""Host memory that a GPU copies into by itself, of the size that was asked for."""

import weakref

import torch

_PORTABLE = 1
"""cudaHostRegisterPortable: page-locked for every device."""


def host_buffer(like: torch.Tensor) -> torch.Tensor:
    """Allocate a tensor on the CPU, page-locked where `like` lies on a GPU, with values yet to be written.

    PyTorch's pinned allocator rounds each buffer up to a power of two, which would make 12 bytes per parameter 16 to
    18, and keeps it. Here memory of the exact size is registered with CUDA, until the tensor is gone.

    Args:
        like: a tensor of the shape and dtype wanted.

    Raises:
        RuntimeError: CUDA does not page-lock so much memory.
    """
    buffer = torch.empty(like.shape, dtype=like.dtype)
    if like.is_cuda and buffer.numel():
        cudart = torch.cuda.cudart()
        code = int(cudart.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, _PORTABLE))
        if code:
            size = f"{buffer.nbytes / 2**30:.2f} GiB of host memory"
            raise RuntimeError(f"{size} for a checkpoint cannot be page-locked: CUDA error {code}")
        weakref.finalize(buffer, cudart.cudaHostUnregister, buffer.data_ptr()).atexit = False
    return buffer
