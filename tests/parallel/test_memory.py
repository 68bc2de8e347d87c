"""What a rank is said to hold, against what tensors take: activations, and what a split backward pass leaves."""

import pytest
import torch

from launch.bench.common import random_stages
from model.context import Context
from parallel.build import forward_functions
from parallel.layout import Layout, Recompute
from parallel.memory import Step, _LayerMemory, stage_memory
from parallel.schedules import Schedule, orders, placement_of
from parallel.stages import Stage, split_for
from tests.shapes import preset, small

SEQ_LEN = 256


def held_bytes(functions, but):
    """The bytes of the tensors that functions and what they close over hold, each storage once, but for some."""
    storages, seen = {}, set()

    def visit(one):
        if id(one) in seen:
            return
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, (tuple, list)):
            for inner in one:
                visit(inner)
        for cell in getattr(one, "__closure__", None) or ():
            visit(cell.cell_contents)

    visit(list(functions))
    for tensor in but:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("recompute", [Recompute.none, Recompute.selective, Recompute.ffn])
@pytest.mark.parametrize("with_head", [False, True])
def test_what_is_held_between_b_and_w_is_what_is_said(with_head, recompute, bf16):
    config = small(2, n_heads=8, n_layers=3, d_model=128, d_ff=344, vocab_size=700, max_seq_len=SEQ_LEN)
    dtype = torch.bfloat16 if bf16 else torch.float32
    stage = Stage(0, 1, 5 if with_head else 4, 1.0)
    stages = random_stages(config, [stage], torch.device("cpu"))
    for layer in stages.in_order():
        layer.module.to(dtype)
    functions, loss = forward_functions(stages, recompute, head_pieces=1)
    y = torch.randn(1, SEQ_LEN, config.d_model, dtype=dtype, requires_grad=True)
    for function in functions[0]:
        y = function(y, Context())
    y = loss(y, torch.zeros(1, SEQ_LEN, dtype=torch.int64)).total if with_head else y
    with stages.deferred.deferring() as left:
        y.backward(None if with_head else torch.ones_like(y))
    said = _LayerMemory(config, Layout(1, 1), Step(1, SEQ_LEN, bf16, recompute))
    assert len(left) == 3 * 4 + with_head
    held = held_bytes(left, but=[p for layer in stages.in_order() for p in layer.module.parameters()])
    assert 3 * said.block_deferred() + with_head * said.head_deferred() == pytest.approx(held, rel=0.02)


# GiB of the first, a middle and the last rank: one rank each on meta tensors, to the allocation, over a whole step.
DRY_RUNS = {
    ("7b", 8, 1, 1, "1f1b"): (37.2, 22.0, 16.5),
    ("7b", 8, 1, 1, "zbv"): (39.2, 31.4, 31.1),
    ("67b", 16, 8, 8, "1f1b"): (15.5, 9.3, 4.8),
    ("67b", 16, 8, 8, "interleaved"): (20.8, 14.5, 10.0),
    ("67b", 16, 8, 8, "zbv"): (16.2, 17.8, 24.8),
    ("67b", 16, 8, 8, "zero_bubble"): (16.6, 20.7, 23.7),
    ("67b", 16, 8, 8, "dualpipev"): (16.8, 15.9, 15.1),
}


@pytest.mark.parametrize(("name", "pp", "tp", "dp", "schedule"), DRY_RUNS)
def test_ranks_of_the_7b_and_67b_hold_what_a_dry_run_of_them_allocated(name, pp, tp, dp, schedule):
    model, placement = preset(name).model, placement_of(Schedule[schedule], pp, None)
    stages = split_for([float(flops) for flops in model.layer_flops(4096)], placement)
    order_of = orders(Schedule[schedule], placement, 2 * pp)
    for rank, gib in zip((0, pp // 2, pp - 1), DRY_RUNS[name, pp, tp, dp, schedule], strict=True):
        own = {stage: stages[stage] for stage in placement.stages_of(rank)}
        said = stage_memory(model, Layout(dp, pp, tp, tp > 1), own, order_of[rank], Step(1, 4096, True))
        assert said.peak / 2**30 == pytest.approx(gib, rel=0.065)
