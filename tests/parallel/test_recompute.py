from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.init import initialise
from model.transformer import Block
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


def forward_and_backward(recompute):
    config = small(n_heads=8)
    block = Block(config)
    initialise(block, "blocks.0.", 1, config.init_std)
    x = torch.randn(2, 16, config.d_model, generator=torch.Generator().manual_seed(0), requires_grad=True)
    run = recomputing(block, recompute)
    with Counted() as counted:
        out = run(x)
        out.square().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in block.parameters())]
    return out.detach(), gradients, counted.ran


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
