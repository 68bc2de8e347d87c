"""What a device takes for the operations that costs are counted in, through the code that trains: products at the
model's shapes, attention, kernels that are bound by memory, and the start of each.

On a CPU the time is that of the thread that computes: what other processes take of its core is no part of it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from conf.schema import Config
from launch.bench.common import copy_bytes, own_time, product_flops, random_stages, seconds_of
from model.config import ModelConfig
from model.context import Context
from model.kernels import causal_attention
from parallel.build import forward_functions
from parallel.layout import Layout
from parallel.plan.cluster import Cluster
from parallel.plan.costs import Prices, pass_time, reaches
from parallel.plan.job import Job
from parallel.plan.operations import Attention, Operation, Product, Traffic
from parallel.plan.work import Layers, layers_of, shape_of
from parallel.sharding import problems as tp_problems
from parallel.stages import Stage
from parallel.zero import Replicas, Zero
from train.job import engine_settings
from train.metrics import peak_flops
from train.optimizer import adamw

_TINY: dict[str, Any] = dict(n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, head_dim=None, d_ff=16, vocab_size=16)
_ROTATED = 4
"""Weights that a product is measured with by turns: in a step each is used once, and comes from memory."""
Together = Callable[[], object]
"""Has all processes that measure begin the next measurement at the same time."""


@dataclass(frozen=True)
class Pass:
    """A pass of a layer as it was measured.

    Attributes:
        name: such as ``block, backward``.
        seconds: that it took.
        operations: what the costs count of it.
        times: how many such layers the model has.
    """

    name: str
    seconds: float
    operations: Sequence[Operation]
    times: int = 1


def tensor_parallel_sizes(model: ModelConfig, most: int) -> list[int]:
    """Return the powers of two up to `most` over which a model's matrices can be cut."""
    return [tp for tp in (2**power for power in range(most.bit_length())) if tp <= most and not tp_problems(model, tp)]


def layers_for(config: Config, tp: int, bf16: bool) -> Layers:
    """Return what a rank's layers compute under tensor parallelism over so many ranks, or alone; the first block's."""
    layout = Layout(1, 1, tp, tp > 1)
    settings = replace(engine_settings(config, layout, bf16=bf16, global_batch=1), seq_len=config.train.seq_len)
    return layers_of(shape_of(Job(config.model, layout, settings), config.model.windows[0]))


def measured_products(
    config: Config, sizes: Sequence[int], device: torch.device, dtype: torch.dtype, together: Together
) -> list[list[float]]:
    """Measure the products of all linear layers, in the form of each: forward, gradient of the input, of the weight.

    Args:
        config: the model, the micro-batch and the length.
        sizes: the numbers of tensor-parallel ranks whose shapes are measured.
        device, dtype: of the products.
        together: see `Together`.

    Returns:
        [m, k, n, TFLOP/s] for each shape; one that several forms share has their mean time.
    """
    seconds: dict[tuple[int, int, int], list[float]] = {}
    for tokens, d_in, width in _linears(config, sizes, dtype is torch.bfloat16):
        x = torch.randn(tokens, d_in, device=device, dtype=dtype)
        gradient = torch.randn(tokens, width, device=device, dtype=dtype)
        weights = [torch.randn(width, d_in, device=device, dtype=dtype) for _ in range(_ROTATED)]
        forms: list[tuple[tuple[int, int, int], Callable[[torch.Tensor], Any]]] = [
            ((tokens, d_in, width), partial(F.linear, x)),
            ((tokens, width, d_in), partial(torch.matmul, gradient)),
            ((width, tokens, d_in), partial(_weight_gradient, gradient, x)),
        ]
        for shape, run in forms:
            together()
            taken = seconds_of(partial(_all, run, weights), device, clock=own_time)
            seconds.setdefault(shape, []).append(taken / _ROTATED)
    return [
        [*map(float, shape), rounded(Product(*shape).flops * len(taken) / sum(taken) / 1e12)]
        for shape, taken in seconds.items()
    ]


def _weight_gradient(gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return gradient.T @ x


def _all(run: Callable[[torch.Tensor], Any], weights: Sequence[torch.Tensor]) -> None:
    for weight in weights:
        run(weight)


def _linears(config: Config, sizes: Sequence[int], bf16: bool) -> list[tuple[int, int, int]]:
    """Return tokens, input and output width of each linear layer, by the products of the layers' forward passes."""
    found = []
    for tp in sizes:
        layers = layers_for(config, tp, bf16)
        forward = (*layers.block.forward, *layers.head.forward)
        found += [(one.m, one.k, one.n) for one in forward if isinstance(one, Product)]
    return list(dict.fromkeys(found))


def measured_attention(config: Config, device: torch.device, dtype: torch.dtype, together: Together) -> dict[str, Any]:
    """Measure attention, forward and backward, at the length of the run and at half of it.

    Returns:
        FLOP/s ``forward`` and ``backward`` at the length, the causal half counted, and ``half_length``, the tokens with
        which half of the best rate is reached, for the two lengths together.
    """
    model, train = config.model, config.train
    rates, totals = {}, []
    for length in (train.seq_len // 2, train.seq_len):
        q, k, v = (
            torch.randn(train.micro_batch, length, heads, model.d_head, device=device, dtype=dtype, requires_grad=True)
            for heads in (model.n_heads, model.n_kv_heads, model.n_kv_heads)
        )
        run = partial(causal_attention, q, k, v, model.attention, None)
        out = run()
        gradient = torch.randn_like(out)
        together()
        forward = seconds_of(run, device, clock=own_time)
        together()
        backward = seconds_of(
            partial(torch.autograd.grad, out, (q, k, v), gradient, retain_graph=True), device, clock=own_time
        )
        shape = (train.micro_batch, length, model.n_heads, model.n_kv_heads, model.d_head)
        flops = Attention(*shape).flops, Attention(*shape, backward=True).flops
        rates = {"forward": flops[0] / forward, "backward": flops[1] / backward}
        totals.append((length, (forward + backward) / sum(flops)))
    (short, slow), (long, fast) = totals
    half = (slow - fast) / (fast / short - slow / long) if fast / short > slow / long else 0.0
    return {**rates, "half_length": max(half, 0.0)}


def passes_of(config: Config, dtype: torch.dtype, seconds: Sequence[float]) -> list[Pass]:
    """Return the passes of embedding, block and head, forward and backward of each, that have taken so many seconds."""
    layers = layers_for(config, 1, dtype is torch.bfloat16)
    kinds = [
        (f"{name}, {kind}", getattr(getattr(layers, name), kind), config.model.n_layers if name == "block" else 1)
        for name in ("embedding", "block", "head")
        for kind in ("forward", "backward")
    ]
    return [
        Pass(name, taken, operations, times) for (name, operations, times), taken in zip(kinds, seconds, strict=True)
    ]


ROUNDS = 5
"""Rounds in which each pass is measured, after one that is not counted."""


class Passes:
    """The layers of a rank, one of each kind, with the optimizer that takes their gradients.

    Args:
        config: the model, the batch and the recomputation; one block of it is built.
        device, dtype: of the layers.
    """

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype):
        self._whole = config
        config = replace(config, model=replace(config.model, n_layers=1))
        self._config, self._device, self._dtype = config, device, dtype
        stages = random_stages(config.model, [Stage(0, 0, 3, 1.0)], device)
        self._zero = Zero(
            stages.in_order(),
            partial(adamw, settings=config.optimizer),
            dtype=dtype,
            micro_batches=2**20,  # no step ends while it is measured
            clip=None,
            replicas=Replicas(None, 0, 1),
            sharing={},
        )
        functions, self._loss = forward_functions(stages, config.parallel.recompute, config.parallel.head_pieces)
        self._embedding, self._block, self._head = functions[0]

    def measure(self, together: Together) -> list[Pass]:
        """Measure the forward and the backward pass of each layer; the first round is not counted."""
        train, model = self._config.train, self._config.model
        shape = (train.micro_batch, train.seq_len)
        tokens = torch.randint(model.vocab_size, shape, device=self._device)
        x = torch.randn(*shape, model.d_model, device=self._device, dtype=self._dtype)
        assert self._loss is not None
        loss = self._loss
        runs: dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor | None]] = {
            "embedding": (lambda: self._embedding(tokens, Context()), torch.randn_like(x)),
            "block": (lambda: self._block(x.detach().requires_grad_(), Context()), torch.randn_like(x)),
            "head": (lambda: loss(self._head(x.detach().requires_grad_(), Context()), tokens).total, None),
        }
        seconds = [self._seconds(run, gradient, together) for run, gradient in runs.values()]
        return passes_of(self._whole, self._dtype, [one for both in seconds for one in both])

    def _seconds(
        self, run: Callable[[], torch.Tensor], gradient: torch.Tensor | None, together: Together
    ) -> tuple[float, float]:
        times = []
        for number in range(ROUNDS + 1):
            together()
            begin = own_time(self._device)
            out = run()
            middle = own_time(self._device)
            out.backward(gradient)
            end = own_time(self._device)
            if number:
                times.append((middle - begin, end - middle))
        middle_of = len(times) // 2
        forward, backward = (sorted(column)[middle_of] for column in zip(*times, strict=True))
        return forward, backward


def host_seconds(config: Config, device: torch.device, dtype: torch.dtype) -> float:
    """Measure the seconds for which a host is busy with an operation, by the passes of a block of almost no work."""
    model = replace(config.model, **_TINY)
    train = replace(config.train, micro_batch=1, seq_len=1)
    passes = Passes(replace(config, model=model, train=train), device, dtype)
    x = torch.randn(1, 1, model.d_model, device=device, dtype=dtype)

    def run() -> None:
        passes._block(x.detach().requires_grad_(), Context()).sum().backward()

    run()
    begin = own_time(device)
    for _ in range(20):
        run()
    # Of a GPU's host, without waiting for the GPU.
    taken = ((time.perf_counter() if device.type == "cuda" else own_time(device)) - begin) / 20
    layers = layers_for(passes._config, 1, dtype is torch.bfloat16)
    return taken / (len(layers.block.forward) + len(layers.block.backward))


def launch_seconds(device: torch.device) -> float:
    """Measure the seconds between two kernels of almost no work that a GPU has queued, by a graph of 200."""
    x = torch.zeros(8, device=device)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(200):
            x.add_(1.0)
    return seconds_of(graph.replay, device) / 200


def values_of_device(
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    most_tp: int,
    together: Together,
    number: int = 0,
    of: int = 1,
) -> tuple[dict[str, Any], list[Pass]]:
    """Measure a device; return the keys of a `Cluster` that say what it is capable of, and the passes measured.

    `traffic_share` makes the last key of them, ``hbm_share``, once figures of several rounds and devices are merged: it
    is what the others leave of the passes, so that what a single measurement is off would be off many times over.

    Args:
        config: the model whose shapes are measured.
        device, dtype: of the model's layers.
        most_tp: the most tensor-parallel ranks whose shapes are measured.
        together: see `Together`.
        number: of this process, of those that measure.
        of: how many those are.
    """
    on_gpu = device.type == "cuda"
    products = measured_products(config, tensor_parallel_sizes(config.model, most_tp), device, dtype, together)
    together()
    square = product_flops(device, dtype, own_time) / 1e12
    best = max(square, *(row[3] for row in products))
    nominal = peak_flops(device) if on_gpu else None
    peak = rounded(nominal / 1e12 if nominal and dtype is torch.bfloat16 else best)
    values: dict[str, Any] = {"peak_tflops" if dtype is torch.bfloat16 else "peak_fp32_tflops": peak}
    values |= {"product_share": min(rounded(best / peak), 1.0), "products": products}
    attention = measured_attention(config, device, dtype, together)
    narrow = min(1.0, config.model.d_head / 128) ** 0.25
    reached = config.train.seq_len / (config.train.seq_len + attention["half_length"]) * narrow
    for name in ("forward", "backward"):
        values[f"attention_{name}_share"] = min(rounded(attention[name] / 1e12 / peak / reached), 1.0)
    values["attention_half_length"] = rounded(attention["half_length"])
    together()
    values["hbm_gb_per_s"] = rounded(copy_bytes(device, own_time) / 1e9)
    host = 1e6 * host_seconds(config, device, dtype)
    # A CPU is its own host: what it does to begin an operation adds to the operation.
    values |= {
        "launch_us": rounded(1e6 * launch_seconds(device) if on_gpu else host),
        "host_us": rounded(host) if on_gpu else 0.0,
    }
    if not on_gpu:
        values["crowded_share"] = _crowded_share(device, dtype, together, number, of)
    return values, Passes(config, device, dtype).measure(together)


def _crowded_share(device: torch.device, dtype: torch.dtype, together: Together, number: int, of: int) -> float:
    """Measure which share of the speed that a core has alone it has while the others compute as well."""
    together()
    crowded, alone = product_flops(device, dtype, own_time), 0.0
    for turn in range(of):
        together()
        if turn == number:
            alone = product_flops(device, dtype, own_time)
    together()
    return min(rounded(crowded / alone), 1.0)


def traffic_share(values: Mapping[str, Any], passes: Sequence[Pass], dtype: torch.dtype) -> float:
    """Return the share of a copy's bandwidth with which other kernels explain the rest of the whole model's passes."""
    unlimited = Cluster(**{**values, "hbm_gb_per_s": 1e12, "hbm_share": 1.0})
    rest = sum(one.times * (one.seconds - predicted(one, unlimited, dtype)) for one in passes)
    moved = sum(each.times * one.num_bytes for each in passes for one in each.operations if isinstance(one, Traffic))
    share = moved / rest / (values["hbm_gb_per_s"] * 1e9) if rest > 0 else 1.0
    return rounded(min(max(share, 0.01), 1.0))


def predicted(one: Pass, cluster: Cluster, dtype: torch.dtype) -> float:
    """Return the seconds of a pass that the costs of a cluster predict."""
    prices = Prices(cluster, torch.finfo(dtype).bits // 8)
    time = pass_time(one.operations, prices, reaches(Layout(1, 1), cluster.gpus_per_node))
    return time.wait_for_host().seconds


def rounded(value: float) -> float:
    """Round to four digits, more than a measurement has."""
    return float(f"{value:.4g}")
