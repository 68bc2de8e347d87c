"""What the parallel layers hold in memory; one process is a group too."""

import pytest
import torch
import torch.distributed as dist

from model.layers import FusedLinears
from parallel.deferral import DeferredGradients
from parallel.tensor import ColumnParallelFusedLinears, TensorParallel


@pytest.fixture(scope="module")
def alone():
    """A tensor-parallel group of this one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield TensorParallel(dist.group.WORLD, 0, 1, True, {})
    dist.destroy_process_group()


def test_the_gathered_sequence_is_not_kept_for_backward(alone):
    layer = ColumnParallelFusedLinears(FusedLinears(8, q=16, k=4), alone, DeferredGradients())
    x = torch.randn(2, 6, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        q, k = layer(x)
    assert set(kept) <= {x.data_ptr(), *(p.data_ptr() for p in layer.parameters())}
    (q.sum() + k.pow(2).sum()).backward()
    plain = FusedLinears(8, q=16, k=4)
    plain.load_state_dict(layer.state_dict())
    y = x.detach().clone().requires_grad_()
    q, k = plain(y)
    (q.sum() + k.pow(2).sum()).backward()
    torch.testing.assert_close(x.grad, y.grad)
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
