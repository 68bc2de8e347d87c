"""Text from trained weights, as it is made."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from conf.errors import BadInput
from model.generate import Decoder, Sampling, generate
from model.weights import loaded_layers
from train.data.tokenizer import eos_id, load_tokenizer
from train.weights import open_source

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def run(options: argparse.Namespace) -> int:
    """Complete prompts: one streams to the terminal, several are printed when all have ended."""
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    problems = sampling.problems()
    if options.max_tokens < 1:
        problems.append(f"--max-tokens={options.max_tokens}: must be at least 1")
    if problems:
        raise BadInput(problems)
    source = open_source(Path(options.source))
    if source.tokenizer is None:
        raise BadInput([f"{source.path}: tokenizer.json is missing; beside the weights it would work"])
    tokenizer, config = load_tokenizer(source.tokenizer), source.weights.config
    eos = eos_id(tokenizer, source.tokenizer)
    prompts = [_encode(tokenizer, eos, text) for text in options.prompt]
    problems = [
        f"--prompt={text[:20]!r}…: {len(ids)} tokens, and the model's context of {config.max_seq_len} leaves no room "
        "for another; a shorter one would work"
        for text, ids in zip(options.prompt, prompts, strict=True)
        if len(ids) >= config.max_seq_len
    ]
    if problems:
        raise BadInput(problems)
    longest = max(map(len, prompts))
    num_tokens = min(options.max_tokens, config.max_seq_len - longest)
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    layers = [layer.to(device, dtype) for _, layer in loaded_layers(source.weights)]
    steps = generate(Decoder(layers, config, prompts, longest + num_tokens), num_tokens, eos, sampling)

    made: list[list[int]] = [[] for _ in prompts]
    alone, shown = len(prompts) == 1, ""
    if alone:
        print(options.prompt[0], end="", flush=True)
    for step in steps:
        for row, token in zip(made, step, strict=True):
            if token is not None:
                row.append(token)
        if alone:
            shown += _say(tokenizer.decode(made[0]), shown)
    if alone:
        print(tokenizer.decode(made[0])[len(shown) :])
        return 0
    for text, row in zip(options.prompt, made, strict=True):
        print(f"--- {text}\n{text}{tokenizer.decode(row)}")
    return 0


def _encode(tokenizer: "Tokenizer", eos: int, text: str) -> list[int]:
    """A prompt at the start of a document, which the end of another comes before, unless the tokenizer marks it."""
    ids: Sequence[int] = tokenizer.encode(text).ids
    return [*ids] if tokenizer.encode("").ids else [eos, *ids]


def _say(text: str, shown: str) -> str:
    """Print what is new of a text whose last character may still be missing bytes; what was printed."""
    new = text[len(shown) :].rstrip("�")
    sys.stdout.write(new)
    sys.stdout.flush()
    return new
