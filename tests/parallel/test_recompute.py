from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import Kernels
from model.init import initial_value
from model.rematerialization import remade, remaking
from model.transformer import Block
from parallel.layout import Recompute
from parallel.recompute import recomputing
from parallel.tensor import TensorParallel, build_layer
from tests.shapes import small


class Counted(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self):
        super().__init__()
        self.ran = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


ALONE = TensorParallel(None, 0, 1, False, {})


def forward_and_backward(recompute, kernels=Kernels.plain):
    config = small(n_heads=8, kernels=kernels)
    block = build_layer(
        lambda: Block(config),
        "blocks.0.",
        config,
        ALONE,
        torch.device("cpu"),
        lambda name, shape: initial_value(name, shape, 1, config.init_std),
    )
    x = torch.randn(2, 16, config.d_model, generator=torch.Generator().manual_seed(0), requires_grad=True)
    run = recomputing(block, recompute)
    # A function that is compiled runs under no such mode.
    with (counted := Counted()) if kernels is Kernels.plain else nullcontext():
        out = run(x)
        out.square().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in block.parameters())]
    return out.detach(), gradients, counted.ran if kernels is Kernels.plain else None


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


def test_a_place_in_memory_that_another_tensor_has_taken_is_not_remade():
    x, room = torch.ones(1000, requires_grad=True), torch.full((1000,), 2.0)
    with remaking(products=False):
        first = room[:]
        remade([first], lambda: [torch.full((1000,), 2.0)], product=False)
        del first
        second = room[:].fill_(5.0)  # as an allocator does, where the one before stood
        y = (x * second).sum()
    y.backward()
    assert torch.equal(x.grad, torch.full((1000,), 5.0))
