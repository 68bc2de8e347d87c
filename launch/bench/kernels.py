"""Each kernel by itself, forward and backward: attention backends, the loss, and the elementwise kernels and norms.

Attention is measured in FLOP/s against a matrix product of the same run, the others in bytes read and written per
second against a copy; each also against plain PyTorch, by turns. On a GPU it is the GPU's own time, as in a step whose
host is ahead of it, and beside it the host's, which is what counts where the GPU waits for it.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table

from launch.bench.common import composed, copy_bytes, device_name, product_flops
from launch.tables import rendered
from model.config import AttentionBackend, Kernels, ModelConfig
from model.fused import add_rms_norm, rms_norm, rotary, silu_mul
from model.kernels import causal_attention, obstacle
from model.layers import rotary_tables
from model.loss import cross_entropy

ON_CPU = ["train.seq_len=256", "model.vocab_size=16384"]
"""The overrides that make the presets smaller on a CPU."""

_AHEAD = 20
"""Products of 8192 that a GPU has yet to do, 1.4 ms each, while the host asks for the kernels behind them."""

Call = Callable[..., Any]
"""A function from leaf tensors to one tensor or several."""


@dataclass(frozen=True)
class Subject:
    """A kernel to measure.

    Attributes:
        name: the name of the kernel.
        implementations: its implementations by name, functions of `inputs`; the others are compared with the first.
        inputs: the leaf tensors, which require gradients.
        amount: the FLOPs or bytes of a forward and a backward pass.
        in_flops: whether the amount is in FLOPs, else in bytes.
    """

    name: str
    implementations: dict[str, Call]
    inputs: list[torch.Tensor]
    amount: float
    in_flops: bool


def measure(overrides: Sequence[str], models: Sequence[str] = ("7b", "67b"), rounds: int = 5) -> dict[str, Any]:
    """Run every implementation by turns; return medians over the rounds, before which one is not counted.

    Args:
        overrides: the overrides, after the presets.
        models: the presets whose shapes are measured.
        rounds: the number of rounds, with one forward and backward pass of each implementation.

    Returns:
        The ``bounds`` and, in ``rows``, each implementation's ``seconds``, the ``host_seconds`` that it takes to ask a
        GPU for it, ``rate`` (FLOP/s or bytes/s), ``share`` of the bound, and ``speedup`` over plain PyTorch; ``absent``
        says which could not run, and why.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bounds = {"flops": product_flops(device, dtype), "bytes": copy_bytes(device)}
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for name in models:
        config = composed([f"model={name}", *(ON_CPU if device.type == "cpu" else [])], overrides).config
        size = (config.train.micro_batch, config.train.seq_len)
        subjects = [_attention(config.model, size, device, dtype, absent)]
        subjects += _elementwise(config.model, size, device, dtype, absent)
        for subject in subjects:
            rows += [{"model": name, **row} for row in _rows(subject, device, rounds, bounds)]
    precision = str(dtype).removeprefix("torch.")
    return {
        "device": device_name(device),
        "precision": precision,
        "bounds": bounds,
        "rows": rows,
        "absent": absent,
    }


def as_text(found: dict[str, Any]) -> str:
    """Render the results of `measure` as text."""
    bounds = found["bounds"]
    title = f"forward and backward, {found['precision']} on {found['device']}; a matrix product "
    title += f"{bounds['flops'] / 1e12:.3g} TFLOP/s, a copy beyond all caches {bounds['bytes'] / 1e9:.3g} GB/s"
    table = Table(
        *("model", "kernel", "way", "ms", "host ms", "rate", "of the bound", "times as fast"),
        title=title,
        title_justify="left",
    )
    for row in found["rows"]:
        rate = f"{row['rate'] / 1e12:.3g} TFLOP/s" if row["in_flops"] else f"{row['rate'] / 1e9:.3g} GB/s"
        ms = [f"{1000 * seconds:.3f}" for seconds in (row["seconds"], row["host_seconds"])]
        share, speedup = f"{row['share']:.1%}", f"{row['speedup']:.2f}"
        table.add_row(row["model"], row["kernel"], row["way"], *ms, rate, share, speedup)
    return "\n".join([rendered(table), *(f"{name}: {why}" for name, why in found["absent"].items())])


def _rows(subject: Subject, device: torch.device, rounds: int, bounds: dict[str, float]) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in subject.implementations}
    host: dict[str, list[float]] = {name: [] for name in subject.implementations}
    for number in range(rounds + 1):
        for name, call in subject.implementations.items():
            whole, of_host = _timed(lambda call=call: _both_passes(call, subject.inputs), device)  # type: ignore[misc]
            if number:
                seconds[name].append(whole)
                host[name].append(of_host)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    base = next(iter(medians.values()))
    bound = bounds["flops" if subject.in_flops else "bytes"]
    return [
        {
            "kernel": subject.name,
            "way": name,
            "seconds": one,
            "host_seconds": statistics.median(host[name]),
            "rate": subject.amount / one,
            "share": subject.amount / one / bound,
            "speedup": base / one,
            "in_flops": subject.in_flops,
        }
        for name, one in medians.items()
    ]


def _both_passes(call: Call, inputs: Sequence[torch.Tensor]) -> None:
    out = call(*inputs)
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    torch.autograd.grad(outputs, inputs, [torch.ones_like(one) for one in outputs])


def _timed(run: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Return the seconds of a call on its device, and those of the host that asks for it."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return (took := time.perf_counter() - begin), took
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    ahead = torch.empty(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(_AHEAD):
        torch.mm(ahead, ahead)
    first.record()
    begin = time.perf_counter()
    run()
    host = time.perf_counter() - begin
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1000, host


def _attention(
    model: ModelConfig, size: tuple[int, int], device: torch.device, dtype: torch.dtype, absent: dict[str, str]
) -> Subject:
    def of(backend: AttentionBackend) -> Call:
        return lambda q, k, v: causal_attention(q, k, v, backend)

    implementations = {"sdpa": of(AttentionBackend.sdpa)}
    for backend in (AttentionBackend.flash2, AttentionBackend.flash3, AttentionBackend.flash4):
        if reason := obstacle(backend, device, dtype):
            absent[backend.name] = reason
        else:
            implementations[backend.name] = of(backend)
    shape = (*size, model.n_heads, model.d_head), (*size, model.n_kv_heads, model.d_head)
    q, kv = (_leaf(*one, device=device, dtype=dtype) for one in shape)
    # There are two products forward, and five backward, which recomputes the scores; a causal half of each.
    flops = 3.5 * 2 * size[0] * size[1] ** 2 * model.n_heads * model.d_head
    name = f"attention, {model.n_heads} heads on {model.n_kv_heads}"
    return Subject(name, implementations, [q, kv, kv.detach().clone().requires_grad_()], flops, True)


def _elementwise(
    model: ModelConfig, size: tuple[int, int], device: torch.device, dtype: torch.dtype, absent: dict[str, str]
) -> list[Subject]:
    def leaf(*shape: int) -> torch.Tensor:
        return _leaf(*shape, device=device, dtype=dtype)

    wide, ff, eps = model.d_model, model.d_ff, model.norm_eps
    x, y, weight = leaf(*size, wide), leaf(*size, wide), leaf(wide)
    gate, up, logits = leaf(*size, ff), leaf(*size, ff), leaf(*size, model.vocab_size)
    q, k = leaf(*size, model.n_heads, model.d_head), leaf(*size, model.n_kv_heads, model.d_head)
    cos, sin = rotary_tables(size[1], model.d_head, model.rope_theta, device)
    labels = torch.randint(model.vocab_size, size, device=device)
    kernels = [Kernels.plain, Kernels.compiled]
    if device.type != "cuda":
        absent["liger"] = "Liger-Kernel runs on GPUs"
    elif find_spec("liger_kernel") is None:
        absent["liger"] = "liger-kernel is not installed"
    else:
        kernels.append(Kernels.liger)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (wide,), weight, eps)

    cos_there, sin_there = (table.to(dtype).unsqueeze(1) for table in (cos, sin))  # other libraries round the tables so

    def rotated(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos_there - b * sin_there, b * cos_there + a * sin_there), dim=-1)

    def added(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + y, norm(x + y, weight)

    def pytorchs_loss(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy((logits * 1).flatten(0, 1).float(), labels.flatten())

    def our_loss(kind: Kernels) -> Call:
        return lambda logits: cross_entropy(logits * 1, labels, kernels=kind).mean

    def both_rotated(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rotated(q), rotated(k)

    def subject(
        name: str, theirs: Call, ours: Callable[[Kernels], Call], inputs: list[torch.Tensor], passes: float
    ) -> Subject:
        found = {"pytorch": theirs, **{each.name: ours(each) for each in kernels}}
        return Subject(name, found, inputs, passes * inputs[0].nbytes, False)

    heads = (q.numel() + k.numel()) / q.numel()
    # `passes` counts how often a kernel reads or writes a tensor of the first input's size, forward and backward.
    return [
        subject("norm", norm, lambda kind: lambda x, w: rms_norm(x, w, eps, kind), [x, weight], 5),
        subject("add, norm", added, lambda kind: lambda x, y, w: add_rms_norm(x, y, w, eps, kind), [x, y, weight], 8),
        subject(
            "rotary",
            both_rotated,
            lambda kind: lambda q, k: rotary(q, k, cos, sin, kind),
            [q, k],
            4 * heads,
        ),
        subject("SwiGLU", lambda g, u: F.silu(g) * u, lambda kind: lambda g, u: silu_mul(g, u, kind), [gate, up], 8),
        # The loss overwrites its logits: each call gets a copy of them.
        subject("loss", pytorchs_loss, our_loss, [logits], 7),
    ]


def _leaf(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()
