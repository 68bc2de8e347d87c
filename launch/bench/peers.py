"""A forward and a backward pass of our model against the same one of `transformers`, `litgpt` and `torchtitan`.

All models get the same tokens and weights by turns: fp32 on the CPU, bf16 on a GPU. Losses and gradient norms show
whether it is the same model.
"""

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.table import Table
from torch import nn

from launch.bench.common import SEED, composed, device_name, synchronised
from launch.bench.contenders import PEERS, Contender, ours
from launch.tables import rendered

DEFAULTS = [
    *["model.n_layers=4", "model.d_model=512", "model.n_heads=8", "model.n_kv_heads=2", "model.d_ff=1536"],
    *["model.vocab_size=8192", "model.max_seq_len=1024", "train.seq_len=1024", "train.micro_batch=2"],
    # This is larger than in training: attention is far from uniform, and a misplaced head shows in the loss.
    "model.init_std=0.06",
]


def measure(overrides: Sequence[str], rounds: int = 5, limit: float = 40.0) -> dict[str, Any]:
    """Run passes by turns, ours first; return medians over the rounds, before which one is not counted.

    Args:
        overrides: the overrides of the model, `train.seq_len` and `train.micro_batch` (sequences of a pass), after
            `DEFAULTS`.
        rounds: the number of rounds, with one forward and backward pass of each model.
        limit: the seconds after which no further round begins, but for the second: a busy machine gets fewer.

    Returns:
        ``ours`` and by name ``peers``: ``seconds`` of a pass, its ``loss``, and on a GPU ``bytes``, the peak of the
        pass beyond the weights. A peer also has ``ratio``, its seconds to ours (above 1 we are faster), its extremes
        ``ratios`` over the rounds, ``loss_difference``, and ``gradient_difference`` of the norms, relative.
        ``absent`` says why a peer could not be compared.

    Raises:
        BadInput: the settings cannot work.
    """
    settings = composed(DEFAULTS, overrides).config
    config, size = settings.model, (settings.train.micro_batch, settings.train.seq_len)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows_BL = torch.randint(config.vocab_size, (size[0], size[1] + 1), generator=torch.Generator().manual_seed(SEED))
    batch = [part.contiguous().to(device) for part in (rows_BL[:, :-1], rows_BL[:, 1:])]
    contenders = {"ours": ours(config, device, dtype)}
    _pass(contenders["ours"], *batch)
    absent = {}
    for name, build in PEERS.items():
        try:
            contender = build(config, device, dtype)
            _pass(contender, *batch)
        # Any exception is caught: another version of a library may have another interface, and is no reason to stop.
        except Exception as error:
            absent[name] = _reason(name, error)
        else:
            contenders[name] = contender
    norms = {name: _gradient_norm(one.model) for name, one in contenders.items()}
    passes: dict[str, list[_Pass]] = {name: [] for name in contenders}
    begin, done = time.perf_counter(), 0
    while done < rounds and (done < 2 or time.perf_counter() - begin < limit):
        for name, one in contenders.items():
            passes[name].append(_pass(one, *batch))
        done += 1
    found = {name: _found(contenders[name], passes[name]) for name in contenders}
    own = found.pop("ours")
    for name, peer in found.items():
        ratios = [theirs.seconds / here.seconds for theirs, here in zip(passes[name], passes["ours"], strict=True)]
        peer |= {
            "version": _version(name),
            "ratio": peer["seconds"] / own["seconds"],
            "ratios": [min(ratios), max(ratios)],
            "loss_difference": peer["loss"] - own["loss"],
            "gradient_difference": norms[name] / norms["ours"] - 1,
        }
    return {
        "parameters": config.num_params,
        "kv_heads": f"{config.n_heads} on {config.n_kv_heads}",
        "tokens": list(size),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "rounds": done,
        "ours": own,
        "peers": found,
        "absent": absent,
    }


def as_text(found: dict[str, Any]) -> str:
    """Render the results of `measure` as text."""
    table = Table("", "s a pass", "MiB", "times ours", "in each round", "loss - ours", "gradient norm")
    for name, one in {"ours": found["ours"], **found["peers"]}.items():
        memory = f"{one['bytes'] / 2**20:.0f}" if one["bytes"] else ""
        row = [f"{name} {one.get('version') or ''}".strip(), f"{one['seconds']:.3f}", memory]
        if "ratio" in one:
            low, high = one["ratios"]
            row += [f"{one['ratio']:.2f}", f"{low:.2f} to {high:.2f}", f"{one['loss_difference']:+.1e}"]
            row.append(f"{one['gradient_difference']:+.1e}")
        table.add_row(*row)
    batch, seq_len = found["tokens"]
    return "\n".join(
        [
            f"forward and backward of {batch} x {seq_len} tokens, {found['parameters']:,} parameters, heads "
            f"{found['kv_heads']}, {found['dtype']}; medians of {found['rounds']} rounds on {found['device']}, "
            f"{found['threads']} threads",
            rendered(table),
            *(f"{name}: {one['what']}" for name, one in found["peers"].items()),
            *(f"{name}: not compared, {reason}" for name, reason in found["absent"].items()),
        ]
    )


@dataclass(frozen=True)
class _Pass:
    seconds: float
    loss: float
    num_bytes: int | None


def _found(one: Contender, passes: Sequence[_Pass]) -> dict[str, Any]:
    last = passes[-1]
    seconds = statistics.median(each.seconds for each in passes)
    return {"what": one.description, "seconds": seconds, "loss": last.loss, "bytes": last.num_bytes}


def _pass(one: Contender, tokens_BL: torch.Tensor, labels_BL: torch.Tensor) -> _Pass:
    gpu = tokens_BL.device.type == "cuda"
    one.model.zero_grad(set_to_none=True)
    allocated = 0
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
    begin = synchronised(tokens_BL.device)
    loss = one.loss(tokens_BL, labels_BL)
    loss.backward()
    seconds = synchronised(tokens_BL.device) - begin
    return _Pass(seconds, float(loss.detach()), torch.cuda.max_memory_allocated() - allocated if gpu else None)


def _gradient_norm(model: nn.Module) -> float:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))


def _version(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None


def _reason(name: str, error: Exception) -> str:
    found = _version(name)
    if found is None:
        return "not installed"
    lines = str(error).splitlines() or [""]
    return f"version {found}: {type(error).__name__}: {lines[0]}"
