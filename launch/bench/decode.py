"""The seconds per decoded token of our KV cache and of `transformers`' generate, with the same weights, by turns."""

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from launch.bench.common import RandomWeights, composed
from model.generate import Decoder
from model.huggingface import write_huggingface
from model.problems import BadInput
from model.weights import loaded_layers

DEFAULTS = [
    *["model.n_layers=8", "model.d_model=512", "model.n_heads=8", "model.n_kv_heads=2", "model.d_ff=1536"],
    *["model.vocab_size=8192", "model.max_seq_len=4096"],
]


def measure(
    overrides: Sequence[str], batch: int = 8, context: int = 2048, tokens: int = 8, rounds: int = 3
) -> dict[str, Any]:
    """Decode greedily after a prompt of `context` tokens, by turns; return the median seconds per step.

    Args:
        overrides: the overrides of the model, after `DEFAULTS`.
        batch: the number of sequences.
        context: the number of tokens of each prompt.
        tokens: the number of timed steps of a round.
        rounds: the number of rounds, with one run of each model.
    """
    config = composed(DEFAULTS, overrides).config.model
    if context + tokens + 1 > config.max_seq_len:
        raise BadInput([f"model.max_seq_len={config.max_seq_len}: the benchmark needs {context + tokens + 1}"])
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as progress
    except ImportError:
        raise BadInput(["transformers is not installed, and is compared with; pip install transformers"]) from None

    weights = RandomWeights(config)
    with tempfile.TemporaryDirectory() as folder:
        write_huggingface(weights, Path(folder), torch.float32, 10**10, 0, 0)
        progress.disable_progress_bar()
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = [layer for _, layer in loaded_layers(weights)]
    prompts_BL = torch.randint(config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    generated = {}
    for _ in range(rounds):
        times, generated["ours"] = _ours(layers, prompts_BL, tokens)
        seconds["ours"] += times
        times, generated["transformers"] = _theirs(theirs, prompts_BL, tokens)
        seconds["transformers"] += times
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return {
        "parameters": config.num_params,
        "kv_heads": f"{config.n_heads} on {config.n_kv_heads}",
        "batch": batch,
        "context": context,
        "device": f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "seconds_per_step": median,
        "ratio": median["transformers"] / median["ours"],
        "same_tokens": bool(torch.equal(generated["ours"], generated["transformers"])),
    }


def as_text(found: dict[str, Any]) -> str:
    """Render the results of `measure` as text."""
    seconds = found["seconds_per_step"]
    return "\n".join(
        [
            f"{found['parameters']:,} parameters, heads {found['kv_heads']}, batch {found['batch']}, context "
            f"{found['context']}, fp32 on {found['device']}",
            f"a token of each sequence, ours          {seconds['ours'] * 1000:.1f} ms",
            f"a token of each sequence, transformers  {seconds['transformers'] * 1000:.1f} ms",
            f"times as fast                           {found['ratio']:.2f}",
            f"the same tokens                         {'yes' if found['same_tokens'] else 'NO'}",
        ]
    )


def _ours(layers: Sequence[torch.nn.Module], prompts_BL: torch.Tensor, tokens: int) -> tuple[list[float], torch.Tensor]:
    decoder = Decoder(layers, prompts_BL.tolist(), prompts_BL.shape[1] + tokens + 1)
    tokens_B, times, generated = decoder.prefill().argmax(-1), [], []
    for _ in range(tokens):
        generated.append(tokens_B)
        begin = time.perf_counter()
        tokens_B = decoder.step(tokens_B).argmax(-1)
        times.append(time.perf_counter() - begin)
    return times, torch.stack(generated, dim=1)


@torch.no_grad()
def _theirs(model: Any, prompts_BL: torch.Tensor, tokens: int) -> tuple[list[float], torch.Tensor]:
    """Time the steps of `generate` by a streamer that receives each token."""
    stamps: list[float] = []

    class Clock:
        def put(self, value: torch.Tensor) -> None:
            stamps.append(time.perf_counter())

        def end(self) -> None:
            pass

    whole = torch.ones_like(prompts_BL)  # else it would treat a token of the prompt as padding
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "streamer": Clock()}
    generated = model.generate(prompts_BL, attention_mask=whole, max_new_tokens=tokens + 1, **options)
    # The streamer gets the prompt first, and then the token that is decoded from the prompt.
    times = [later - earlier for earlier, later in pairwise(stamps[1:])]
    return times, generated[:, prompts_BL.shape[1] : prompts_BL.shape[1] + tokens]
