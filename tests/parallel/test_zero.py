"""ZeRO-1's buckets in one process; the sweeps have them over several."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from conf.train_settings import OptimizerConfig
from model.layers import FusedLinears
from parallel import zero as zero_module
from parallel.build import Layer
from parallel.deferral import DeferredGradients, DeferringFusedLinears, add_product
from parallel.memory import state_bytes_per_parameter
from parallel.sharding import ParameterInfo, Shard
from parallel.zero import Replicas, Zero, sum_of_squares
from tests.shapes import matrices_and_vectors
from train.optimizer import adamw

SETTINGS = OptimizerConfig(lr=0.01)


@pytest.fixture(scope="module", autouse=True)
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def layers():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9)) for _ in range(3)]


def zero(model, bucket=1, dp=1, rank=0, **changes):
    settings = dict(dtype=torch.float32, micro_batches=2, clip=1.0, sharing={}) | changes
    replicas = Replicas(None, rank, dp)
    return Zero(named(model), partial(adamw, settings=SETTINGS), replicas=replicas, bucket=bucket, **settings)


def named(model):
    """Layers that no rank shares, by their place."""
    return [
        Layer(
            str(index),
            module,
            {
                name: ParameterInfo(f"{index}.{name}", p.shape, Shard(0, 0, len(p), 1), 1, True, True, p.ndim > 1)
                for name, p in module.named_parameters()
            },
        )
        for index, module in enumerate(model)
    ]


def take_step(optimizer):
    """By the gradient as it was summed; its norm before clipping."""
    norm = optimizer.reduce().sqrt()
    optimizer.update(SETTINGS.lr, norm, torch.tensor(1.0))
    return norm.float()


def backward(model, seed, scale=1.0):
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed))
    x = x.to(next(model[0].parameters()).dtype)
    for layer in model:
        x = layer(x)
    (x.float().square().sum() * scale).backward()


@pytest.mark.parametrize("bucket", [1, 100, 10**9])
@pytest.mark.parametrize("clip", [1.0, None])
def test_steps_are_those_of_adamw_whatever_the_buckets(bucket, clip):
    ours, plain = layers(), nn.ModuleList(layers())
    optimizer, reference = zero(ours, bucket, clip=clip), adamw(*matrices_and_vectors(plain), SETTINGS)
    for step in range(3):
        reference.zero_grad()
        for micro_batch in range(2):
            backward(ours, 10 * step + micro_batch)
            backward(plain, 10 * step + micro_batch)
        norm = nn.utils.clip_grad_norm_(plain.parameters(), clip or float("inf"))
        reference.step()
        torch.testing.assert_close(take_step(optimizer), norm)
    for got, want in zip(nn.ModuleList(ours).parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want)


def test_a_bucket_holds_as_few_layers_as_fill_it_and_one_kind_of_parameter():
    optimizer = zero(layers(), bucket=100)
    names = [[tuple(slot.parameter.shape) for slot in bucket.slots] for bucket in optimizer.buckets]
    # a matrix has 81 elements and a layer 27 in vectors
    assert names == [[(9, 9)] * 2, [(9,)] * 9, [(9, 9)]]
    assert [bucket.kind.decays for bucket in optimizer.buckets] == [True, False, True]


def test_gradients_are_taken_and_let_go_at_once_and_the_last_micro_batch_completes_a_bucket(monkeypatch):
    model = layers()
    optimizer = zero(model)
    reduced = []
    monkeypatch.setattr("parallel.zero.Bucket.reduce", lambda bucket, replicas: reduced.append(bucket))
    backward(model, 1)
    assert all(p.grad is None for p in nn.ModuleList(model).parameters()) and not reduced
    x = torch.randn(4, 9)
    first, middle, last = model
    y = first(x).detach().requires_grad_()
    last(middle(y)).sum().backward()
    done = {id(slot.parameter) for bucket in reduced for slot in bucket.slots}
    assert done == {id(p) for layer in (middle, last) for p in layer.parameters()}  # while the first has yet to begin
    assert len(reduced) == len({id(bucket) for bucket in reduced}) < len(optimizer.buckets)


def test_a_bucket_is_complete_with_the_last_micro_batch_of_a_step_however_many_it_has(monkeypatch):
    model = layers()
    optimizer, reduced = zero(model), []
    reduce = zero_module.Bucket.reduce
    monkeypatch.setattr(
        zero_module.Bucket, "reduce", lambda bucket, replicas: (reduced.append(bucket), reduce(bucket, replicas))
    )
    for micro_batches in (3, 1, 1, 2):
        optimizer.expect(micro_batches)
        for micro_batch in range(micro_batches):
            assert not reduced
            backward(model, micro_batch)
        assert len(reduced) == len(optimizer.buckets)
        take_step(optimizer)
        reduced.clear()


@pytest.mark.parametrize("deferring", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_linear_layers_are_added_as_they_are_multiplied(monkeypatch, dtype, deferring):
    """Autograd sees none, what a buffer held before a step is overwritten, and the last completes its bucket."""
    torch.manual_seed(0)
    deferred = DeferredGradients()
    model = [nn.Sequential(DeferringFusedLinears(FusedLinears(24, a=16, b=40), deferred))]
    optimizer, reduced = zero(model, dtype=dtype), []
    monkeypatch.setattr("parallel.zero.Bucket.reduce", lambda bucket, replicas: reduced.append(bucket))
    for bucket in optimizer.buckets:
        bucket.gradients.fill_(7.0)
    expected = [torch.zeros(width, 24, dtype=torch.float64) for width in (16, 40)]
    for _ in range(2):
        assert not reduced
        x, grads = torch.randn(3, 5, 24), [torch.randn(3, 5, width) for width in (16, 40)]
        x, grads = x.to(dtype), [grad.to(dtype) for grad in grads]
        with deferred.deferring() if deferring else nullcontext([]) as later:
            torch.autograd.backward(model[0](x.requires_grad_()), grads)
        for run in later:
            run()
        for total, grad in zip(expected, grads, strict=True):
            total += grad.double().flatten(0, 1).T @ x.double().flatten(0, 1)
    slots = [(bucket, slot) for bucket in optimizer.buckets for slot in bucket.slots]
    assert reduced == optimizer.buckets and all(slot.parameter.grad is None for _, slot in slots)
    near = 1e-6 if dtype is torch.float32 else 1e-2
    for (bucket, slot), want in zip(slots, expected, strict=True):
        torch.testing.assert_close(slot.of(bucket.gradients).double(), want, rtol=near, atol=near * 10)


@pytest.mark.gpu
@pytest.mark.parametrize("first", [True, False])
def test_a_gpu_adds_products_of_bf16_unrounded(first):
    left, right = (torch.randn(512, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    total = torch.randn(512, 512, device="cuda")
    want = left.double() @ right.double() + (0 if first else total.double())
    add_product(total, left.T.contiguous().T, right, first)
    assert (total - want).norm() < 1e-5 * want.norm()  # rounded to bf16, the product alone is off by 1.7e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dp", [1, 2, 8])
def test_bytes_per_parameter(dtype, dp):
    model = [nn.Linear(256, 512, bias=False) for _ in range(3)]
    optimizer = zero(model, dtype=dtype, dp=dp)
    held = {}
    for bucket in optimizer.buckets:
        for tensor in (bucket.weights, bucket.gradients, bucket.master):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held[id(bucket)] = 2 * bucket.master.nbytes  # Adam's moments
    assert sum(held.values()) == 3 * 256 * 512 * state_bytes_per_parameter(dtype == torch.bfloat16, dp)


@pytest.mark.parametrize("dp", [1, 3, 4])
def test_every_element_is_owned_by_one_replica(dp):
    seen = {}
    for rank in range(dp):
        model = layers()
        names = {parameter: name for name, parameter in nn.ModuleList(model).named_parameters()}
        for bucket in zero(model, 100, dp=dp, rank=rank).buckets:
            for own in bucket.owned():
                parameter = own.slot.parameter
                drawn = parameter.flatten()[own.start : own.start + own.size]
                assert torch.equal(bucket.master[own.offset : own.offset + own.size], drawn)
                seen.setdefault(names[parameter], []).extend(range(own.start, own.start + own.size))
    sizes = {name: parameter.numel() for name, parameter in nn.ModuleList(layers()).named_parameters()}
    assert {name: sorted(found) for name, found in seen.items()} == {n: list(range(size)) for n, size in sizes.items()}


def test_gradients_that_are_not_finite_move_nothing_and_are_not_counted():
    model = layers()
    optimizer = zero(model)
    for scale in (1.0, float("nan")):
        before = [p.detach().clone() for p in nn.ModuleList(model).parameters()]
        backward(model, 1, scale)
        backward(model, 2, scale)
        norm = take_step(optimizer)
    assert all(torch.equal(p, old) for p, old in zip(nn.ModuleList(model).parameters(), before, strict=True))
    assert norm.isnan()
    assert {float(optimizer.adam.state[bucket.master]["step"]) for bucket in optimizer.buckets} == {1.0}
    backward(model, 3)
    backward(model, 4)
    take_step(optimizer)
    assert not torch.equal(next(model[0].parameters()), before[0])


def test_a_parameter_that_saw_no_gradient_has_none():
    model = layers()
    optimizer = zero(model, 10**9)
    for _ in range(2):
        backward(model, 1)
    take_step(optimizer)
    for _ in range(2):
        backward(model[1:], 1)  # the first layer takes no part
    take_step(optimizer)
    for bucket in optimizer.buckets:
        for slot in bucket.slots:
            unused = any(slot.parameter is one for one in model[0].parameters())
            assert slot.of(bucket.gradients).eq(0).all() == unused


def test_master_weights_are_what_was_drawn_and_not_rounded():
    drawn = [p.detach().clone() for p in nn.ModuleList(layers()).parameters()]
    model = layers()
    optimizer = zero(model, dtype=torch.bfloat16)
    kept = {}
    for bucket in optimizer.buckets:
        kept |= {own.slot.parameter: bucket.master.narrow(0, own.offset, own.size) for own in bucket.owned()}
    for parameter, exact in zip(nn.ModuleList(model).parameters(), drawn, strict=True):
        assert torch.equal(kept[parameter], exact.flatten()) and torch.equal(parameter, exact.bfloat16())


@pytest.mark.parametrize("size", [1, 2**16 - 1, 2**16, 3 * 2**16 + 5, 33_554_432])
def test_squares_of_a_long_bucket_are_summed_to_the_last_digits(size):
    """PyTorch's own norm of one flat fp32 tensor on the CPU is off by 2e-3 at the last of these."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    exact = values.double().square().sum()
    assert sum_of_squares(values) == pytest.approx(exact.item(), rel=1e-6)


def test_the_norm_of_a_long_bucket_is_exact_to_its_last_digits():
    """PyTorch's own sum of these eight million squares is off by 2e-4."""
    model = [nn.Linear(3000, 3000, bias=False)]
    optimizer = zero(model, 10**9, micro_batches=1)
    model[0].weight.backward(torch.randn(3000, 3000, generator=torch.Generator().manual_seed(0)))
    (bucket,) = optimizer.buckets
    exact = bucket.gradients.double().square().sum()
    assert optimizer.reduce() == pytest.approx(exact.item(), rel=1e-6)


def test_an_overflow_stays_one():
    for value in (float("inf"), float("nan")):
        assert not sum_of_squares(torch.tensor([1.0, value])).isfinite()


def test_replicas_that_compute_the_same_gradient_keep_the_mean_of_it(monkeypatch):
    """Without sequence parallelism each tensor-parallel rank has a norm weight's whole gradient, up to rounding."""
    model = layers()
    shared = named(model)
    for layer in shared:
        for name, info in layer.infos.items():
            layer.infos[name] = replace(info, shared_by=2, summed=info.decays)
    optimizer = Zero(
        shared,
        partial(adamw, settings=SETTINGS),
        replicas=Replicas(None, 0, 1),
        dtype=torch.float32,
        micro_batches=1,
        clip=None,
        sharing={2: "both"},
    )
    # Another rank with the same gradients.
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: tensor.mul_(2) if group == "both" else None)
    backward(model, 1)
    alone = {bucket.kind.decays: bucket.gradients.clone() for bucket in optimizer.buckets}
    optimizer.reduce()
    for bucket in optimizer.buckets:
        torch.testing.assert_close(bucket.gradients, alone[bucket.kind.decays] * (2 if bucket.kind.decays else 1))


def test_weights_travel_in_the_order_in_which_they_are_used(monkeypatch):
    """A bucket of all norms is closed last, and the second layer would wait behind the last one's matrices for it."""
    optimizer = zero(layers(), bucket=81)
    order = []
    monkeypatch.setattr("parallel.zero.Bucket.start_gather", lambda bucket, replicas: order.append(bucket))
    optimizer.start_gather()
    assert [bucket.kind.decays for bucket in optimizer.buckets] != [bucket.kind.decays for bucket in order]
    firsts = [bucket.first_use for bucket in order]
    assert firsts == sorted(firsts) and {id(one) for one in order} == {id(one) for one in optimizer.buckets}
