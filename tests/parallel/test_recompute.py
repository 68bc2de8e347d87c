from collections import Counter
from contextlib import nullcontext
from threading import Thread

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import Kernels
from model.context import Context
from model.rematerialization import Rematerialization
from parallel.build import ALONE, build_stages, initial_values
from parallel.layout import Recompute
from parallel.recompute import recomputing
from tests.shapes import small


class Counted(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self):
        super().__init__()
        self.ran = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


COUNTED = ["mm", "silu", "rsqrt", "as_strided"]


def built(config, device="cpu"):
    values = initial_values(config, 1)
    (layer,) = build_stages(config, {0: range(1, 2)}, ALONE, torch.device(device), values).layers[0]
    return layer.module


def forward_and_backward(recompute, kernels=Kernels.plain, device="cpu", thread=False):
    config = small(n_heads=8, kernels=kernels)
    block = built(config, device)
    x = torch.randn(2, 16, config.d_model, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    run = recomputing(block, recompute)
    # A function that is compiled runs under no such mode.
    with (counted := Counted()) if kernels is Kernels.plain and not thread else nullcontext():
        out = run(x)
        total = out.square().sum()
        if thread:
            other = Thread(target=total.backward)
            other.start()
            other.join()
        else:
            total.backward()
    gradients = [x.grad, *(parameter.grad for parameter in block.parameters())]
    return out.detach(), gradients, counted.ran if kernels is Kernels.plain and not thread else None


@pytest.mark.parametrize("how", [Recompute.selective, Recompute.ffn, Recompute.full])
def test_values_and_gradients_are_the_same_bits(how):
    expected_out, expected, _ = forward_and_backward(Recompute.none)
    out, gradients, _ = forward_and_backward(how)
    assert torch.equal(out, expected_out)
    assert all(torch.equal(got, want) for got, want in zip(gradients, expected, strict=True))


def test_what_is_computed_again():
    ran = {how: forward_and_backward(how)[2] for how in Recompute}
    products = {how: ran[how]["mm"] for how in Recompute}
    attention = {how: ran[how]["_scaled_dot_product_flash_attention_for_cpu"] for how in Recompute}
    # seven matrices: full makes their products once more, all but the last, whose result nothing waits for
    assert products[Recompute.selective] == products[Recompute.none]
    assert products[Recompute.ffn] == products[Recompute.none] + 2
    assert products[Recompute.none] + 6 <= products[Recompute.full] <= products[Recompute.none] + 7
    assert attention == {Recompute.none: 1, Recompute.selective: 1, Recompute.ffn: 1, Recompute.full: 2}
    # the gradient of SwiGLU's product computes it once in any case
    assert [ran[how]["silu"] for how in Recompute] == [2, 3, 3, 3]


@pytest.mark.parametrize("how", list(Recompute))
def test_compiled_kernels_agree_under_every_recomputation(how):
    expected_out, expected, _ = forward_and_backward(Recompute.none)
    out, gradients, _ = forward_and_backward(how, Kernels.compiled)
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-6)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_a_place_in_memory_that_another_tensor_has_taken_is_not_recomputed():
    x, room = torch.ones(1000, requires_grad=True), torch.full((1000,), 2.0)
    rematerialization = Rematerialization(products=False)
    with rematerialization.saving():
        first = room[:]
        rematerialization.offer([first], lambda: [torch.full((1000,), 2.0)], product=False)
        del first
        second = room[:].fill_(5.0)  # as an allocator does, where the one before stood
        y = (x * second).sum()
    y.backward()
    assert torch.equal(x.grad, torch.full((1000,), 5.0))


@pytest.mark.parametrize("how", list(Recompute))
def test_a_backward_pass_on_another_thread_gives_the_same_bits(how):
    _, expected, _ = forward_and_backward(Recompute.none)
    _, gradients, _ = forward_and_backward(how, thread=True)
    assert all(torch.equal(got, want) for got, want in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("how", [Recompute.selective, Recompute.ffn])
def test_on_the_meta_device_a_block_recomputes_what_it_does_elsewhere(how):
    # The address of the data of every meta tensor is 0.
    _, gradients, ran = forward_and_backward(how, device="meta")
    _, expected, there = forward_and_backward(how)
    assert [gradient.shape for gradient in gradients] == [gradient.shape for gradient in expected]
    # Attention runs as other operators there. Each use of a recomputed tensor is a view `as_strided` of it.
    assert [ran[name] for name in COUNTED] == [there[name] for name in COUNTED] and there["as_strided"]


def test_tensors_on_the_meta_device_are_told_apart():
    asked = []

    def offered(rematerialization, shape):
        tensor = torch.empty(shape, device="meta")
        rematerialization.offer(
            [tensor], lambda: asked.append(shape) or [torch.empty(shape, device="meta")], product=False
        )
        return tensor

    rematerialization = Rematerialization(products=False)
    with rematerialization.saving():
        first, second, other = (offered(rematerialization, shape) for shape in [(3,), (5,), (7,)])
        x, y, z = (torch.ones(size, device="meta", requires_grad=True) for size in (3, 5, 4))
        total = (x * first).sum() + (y * second).sum() + (z * torch.empty(4, device="meta")).sum()
    assert not asked and other.shape == (7,)
    total.backward()
    assert sorted(asked) == [(3,), (5,)]


def test_two_forward_passes_before_a_backward_pass_do_not_share_recipes():
    config = small()
    run = recomputing(built(config), Recompute.ffn)
    inputs = [torch.randn(1, 8, config.d_model, requires_grad=True) for _ in range(2)]
    outs = [run(x, Context()) for x in inputs]
    got = [torch.autograd.grad(out.square().sum(), x)[0] for out, x in reversed(list(zip(outs, inputs, strict=True)))]
    plain = recomputing(built(config), Recompute.none)
    want = [torch.autograd.grad(plain(x, Context()).square().sum(), x)[0] for x in reversed(inputs)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
