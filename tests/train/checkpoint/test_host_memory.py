"""The copy of a checkpoint in host memory; CUDA's part is played."""

import gc

import pytest
import torch

from train.checkpoint.host_memory import host_buffer


class OnGpu:
    """What of a tensor on a GPU is asked for."""

    is_cuda, shape, dtype = True, (1025,), torch.float32


class Cudart:
    def __init__(self, code=0):
        self.code, self.calls = code, []

    def cudaHostRegister(self, address, size, flags):
        self.calls.append(("register", address, size))
        return self.code

    def cudaHostUnregister(self, address):
        self.calls.append(("unregister", address))


@pytest.fixture
def cudart(monkeypatch):
    played = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: played)
    return played


def test_exactly_what_is_needed_is_page_locked_until_the_buffer_is_gone(cudart):
    buffer = host_buffer(OnGpu())
    address = buffer.data_ptr()
    assert buffer.shape == (1025,) and buffer.dtype == torch.float32
    assert buffer.untyped_storage().nbytes() == 1025 * 4
    assert cudart.calls == [("register", address, 1025 * 4)]
    del buffer
    gc.collect()
    assert cudart.calls[1:] == [("unregister", address)]


def test_a_share_without_elements_is_not_registered(cudart):
    empty = OnGpu()
    empty.shape = (0,)
    assert host_buffer(empty).numel() == 0 and cudart.calls == []


def test_memory_that_cannot_be_page_locked_is_said(cudart):
    cudart.code = 2
    with pytest.raises(RuntimeError, match=r"0\.00 GiB .* cannot be page-locked: CUDA error 2"):
        host_buffer(OnGpu())
    assert len(cudart.calls) == 1


def test_on_the_cpu_nothing_is_page_locked(cudart):
    assert host_buffer(torch.zeros(3, 5)).shape == (3, 5) and cudart.calls == []


@pytest.mark.gpu
def test_a_gpu_copies_into_it_and_finds_it_page_locked():
    values = torch.randn(100_003, device="cuda")
    buffer = host_buffer(values)
    assert buffer.is_pinned()
    buffer.copy_(values, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(buffer, values.cpu())
