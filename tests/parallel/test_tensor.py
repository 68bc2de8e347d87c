"""What the parallel layers hold in memory, and the loss at odd shapes; one process is a group too."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.layers import FanOut
from model.loss import cross_entropy
from parallel.loss import vocab_parallel_cross_entropy
from parallel.tensor import ColumnParallelFanOut, TensorParallel


@pytest.fixture(scope="module")
def alone():
    """A tensor-parallel group of this one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield TensorParallel(dist.group.WORLD, 0, 1, True, {})
    dist.destroy_process_group()


class Largest(TorchDispatchMode):
    """The most values in any tensor that was newly made."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.values = max(self.values, x.numel())
        return out


def logits_and_labels(rows, vocab_size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, rows, vocab_size, generator=generator).mul(3).to(dtype)
    labels = torch.randint(vocab_size, (1, rows), generator=generator)
    labels[0, ::7] = -100
    return logits, labels


@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 5), (255, 37), (600, 1003)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradient_are_those_of_the_plain_one(alone, rows, vocab_size, dtype):
    logits, labels = logits_and_labels(rows, vocab_size, dtype)
    results = []
    for loss in (cross_entropy, lambda x, y: vocab_parallel_cross_entropy(x, y, 0, alone)):
        source = logits.clone().requires_grad_()
        value = loss(source * 1, labels)
        (value * 0.5).backward()
        results.append((value.detach(), source.grad.float()))
    (plain, plain_grad), (ours, our_grad) = results
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    rounding = {} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-8}
    torch.testing.assert_close(our_grad.to(dtype), plain_grad.to(dtype), **rounding)


def test_large_logits_do_not_overflow(alone):
    logits = torch.tensor([[[1e4, -1e4, 9.99e3]]])
    labels = torch.tensor([[0]])
    assert vocab_parallel_cross_entropy(logits, labels, 0, alone).item() == pytest.approx(4.54e-5, rel=1e-2)


def test_no_second_tensor_of_the_logits_size_is_made_and_the_gradient_overwrites_them(alone):
    source, labels = logits_and_labels(1024, 200, torch.bfloat16)
    logits = source.requires_grad_() * 1
    before = logits.detach().clone()
    with Largest() as largest:
        loss = vocab_parallel_cross_entropy(logits, labels, 0, alone)
        (gradient,) = torch.autograd.grad(loss, logits)
    assert 0 < largest.values <= logits.numel() // 4
    assert gradient.data_ptr() == logits.data_ptr() and not torch.equal(logits.detach(), before)


def test_the_gathered_sequence_is_not_kept_for_backward(alone):
    layer = ColumnParallelFanOut(FanOut(8, q=16, k=4), alone)
    x = torch.randn(2, 6, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        q, k = layer(x)
    assert set(kept) <= {x.data_ptr(), *(p.data_ptr() for p in layer.parameters())}
    (q.sum() + k.pow(2).sum()).backward()
    plain = FanOut(8, q=16, k=4)
    plain.load_state_dict(layer.state_dict())
    y = x.detach().clone().requires_grad_()
    q, k = plain(y)
    (q.sum() + k.pow(2).sum()).backward()
    torch.testing.assert_close(x.grad, y.grad)
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
