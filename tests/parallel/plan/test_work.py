"""The operations that the plan counts by formula, against those that a dry run records from the code itself."""

from dataclasses import replace
from itertools import count

import pytest

from parallel.dry_run.rank import run
from parallel.engine import EngineSettings
from parallel.layout import Layout, Recompute
from parallel.plan.job import Job
from parallel.plan.operations import Attention, GroupKind, Message, Product, Traffic, Wait
from parallel.plan.replicas import LayerTime, _buckets
from parallel.plan.work import layers_of, shape_of
from parallel.schedules import Pass, Schedule, placement_of, split_off
from tests.shapes import small

MODEL = small(n_layers=6, d_model=256, n_heads=8, n_kv_heads=2, d_ff=768, vocab_size=1000, max_seq_len=128)


def job(
    tp=1, pp=1, dp=1, schedule="1f1b", recompute="none", head_pieces=1, micro_batch=1, sequence_parallel=True, **slides
):
    """A job of the model above, with buckets that span some layers."""
    settings = EngineSettings(
        micro_batch, 2 * pp, 1.0, True, 1, 128, Recompute[recompute], head_pieces, Schedule[schedule],
        placement_of(Schedule[schedule], pp, None), bucket=10**6,
    )  # fmt: skip
    return Job(replace(MODEL, **slides), Layout(dp, pp, tp, sequence_parallel and tp > 1), settings)


def of_layers(planned, action, split):
    """The operations of a pass by formula."""
    layers = layers_of(shape_of(planned))
    blocks = [layers_of(shape_of(planned, window)).block for window in planned.model.windows]
    kinds = [layers.embedding, *blocks, layers.head]
    stage = planned.stages[action.stage]
    own = kinds[stage.start : stage.stop]
    if action.what is Pass.F:
        return [one for layer in own for one in layer.forward]
    if action.what is Pass.W:
        return [one for layer in reversed(own) for one in layer.weights]
    whole = (action.stage, action.micro_batch) not in split
    return [one for layer in reversed(own) for one in (layer.backward if whole else layer.input_gradient)]


def told(operations):
    """Products, attention and messages of tensor parallelism, with messages numbered as they come."""
    found, numbers, number = [], {}, count()
    for one in operations:
        if isinstance(one, Message) and one.kind is GroupKind.tp:
            if one.index >= 0:
                numbers[one.index] = next(number)
            index = numbers.get(one.index, -1) if one.index >= 0 else -1
            found.append((one.operation, one.num_bytes, one.ranks, index))
        elif isinstance(one, Wait) and one.index in numbers:
            found.append(("wait", numbers[one.index]))
        elif isinstance(one, (Product, Attention)):
            found.append(one)
    return found


JOBS = {
    "replicas": dict(dp=2),
    "sequence parallel": dict(tp=2),
    "tensor parallel, a key/value head on two ranks": dict(tp=4, sequence_parallel=False),
    "several sequences, selective, in pieces": dict(tp=2, recompute="selective", head_pieces=3, micro_batch=2),
    "gate and up again": dict(tp=2, recompute="ffn"),
    "whole blocks again": dict(tp=2, recompute="full"),
    "split": dict(tp=2, pp=2, schedule="zero_bubble"),
    "split, whole blocks again": dict(pp=2, schedule="zbv", recompute="full"),
    "windows, but for every third block": dict(pp=2, tp=2, recompute="full", window=48, window_pattern="ssf"),
    "split here and there": dict(tp=2, pp=2, dp=2, schedule="dualpipev", head_pieces=2),
}


@pytest.mark.parametrize("name", JOBS)
def test_products_attention_and_messages_are_those_of_the_code(name):
    planned = job(**JOBS[name])
    for rank in range(0, planned.layout.world_size, planned.layout.dp * planned.layout.tp):
        recorded = run(planned, rank)
        passes = [section for section in recorded.sections if section.action is not None]
        split = split_off(section.action for section in passes)
        assert len(passes) >= 2 * planned.settings.accumulation
        for section in passes:
            expected = of_layers(planned, section.action, split)
            assert told(expected) == told(section.operations), section.name
        hop = planned.settings.micro_batch * 128 * MODEL.d_model * 2
        hop //= planned.layout.tp if planned.layout.sequence_parallel else 1
        sent = {one.num_bytes for one in recorded.exchanges if one.kind is GroupKind.pp and one.of is not None}
        assert sent == ({hop} if planned.layout.pp > 1 else set())


def test_kernels_between_products_move_what_the_code_moves():
    """But for what a formula need not know: token ids, fp32 scales, and norms, whose gradients are several kernels."""
    recorded = run(job(), 0)
    planned = job()
    for section in [one for one in recorded.sections if one.action is not None][:2]:
        moved = sum(
            one.num_bytes
            for one in section.operations
            if isinstance(one, Traffic) and one.num_bytes > 10**5 and "view" not in one.name
        )
        said = sum(one.num_bytes for one in of_layers(planned, section.action, set()) if isinstance(one, Traffic))
        assert said == pytest.approx(moved, rel=0.15), section.name


def test_replicas_exchange_what_the_buckets_hold():
    planned = job(dp=2, pp=2)
    layers = layers_of(shape_of(planned))
    per_layer = [LayerTime(one, None) for one in [layers.embedding, *[layers.block] * 6, layers.head]]
    for rank in range(2):
        recorded = run(planned, 2 * rank)
        buckets = list(_buckets(planned, rank, per_layer))
        for operation, size in (("reduce_scatter", 4), ("all_gather", 2)):
            sizes = sorted(
                one.num_bytes / size
                for one in recorded.exchanges
                if one.kind is GroupKind.dp and one.operation == operation and one.num_bytes / size > 10**4
            )
            assert sizes == pytest.approx(sorted(parameters for _, _, parameters in buckets), rel=0.01)


@pytest.mark.parametrize("how", [dict(tp=2), dict(tp=4, sequence_parallel=False), dict(tp=8)])
def test_what_several_ranks_hold_is_summed_over_them(how):
    """Norms, and key/value heads where there are fewer of them than ranks: 2 here."""
    planned = job(**how)
    layers = layers_of(shape_of(planned))
    shared = MODEL.n_layers * layers.block.shared_parameters + layers.head.shared_parameters
    after = run(planned, 0).sections[-1]
    assert after.action is None
    messages = [one for one in after.operations if isinstance(one, Message)]
    summed = [one for one in messages if one.kind in (GroupKind.sharing, GroupKind.tp)]
    assert {one.operation for one in summed} == {"all_reduce"}
    assert sum(one.num_bytes for one in summed) == pytest.approx(4 * shared, rel=0.01)
