"""Text from trained weights, as it is made, on one device or on the ranks of a layout."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from launch.one_replica import is_first, joined, layout_problems, run_on_replica
from launch.speech import Tokenizer, tokenizer_of
from model.config import ModelConfig
from model.generate import Sampling, generate
from model.problems import BadInput
from model.weights import Weights
from parallel.decode import StageDecoder, load_stage
from parallel.layout import Layout
from train.pretrained import TOKENIZER, open_source


@dataclass(frozen=True)
class Request:
    """What is to be completed.

    Attributes:
        weights: of the model.
        tokenizer: of the model.
        texts: the prompts; `prompts` are their token ids.
        num_tokens: to make at most; they fit the context.
        sampling: how they are drawn.
        layout: one replica.
    """

    weights: Weights
    tokenizer: Tokenizer
    texts: list[str]
    prompts: list[list[int]]
    num_tokens: int
    sampling: Sampling
    layout: Layout


def run(options: argparse.Namespace) -> int:
    """Complete prompts: one streams to the terminal, several are printed when all have ended."""
    return run_on_replica(options, _request, _complete)


def _request(options: argparse.Namespace, checked: bool) -> Request:
    """The command, tokenised.

    Raises:
        BadInput: with every problem found.
    """
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    problems = sampling.problems()
    if options.max_tokens < 1:
        problems.append(f"--max-tokens={options.max_tokens}: must be at least 1")
    if problems:
        raise BadInput(problems)
    source = open_source(options.source, checked=checked)
    config = source.weights.config
    problems = layout_problems(options, config)
    if source.tokenizer is None and problems:
        raise BadInput([*problems, f"{source.path}: {TOKENIZER} is missing; beside the weights it would work"])
    tokenizer = tokenizer_of(source)
    prompts = [tokenizer.encode(text) for text in options.prompt]
    if problems := problems + prompt_problems(options.prompt, prompts, config):
        raise BadInput(problems)
    num_tokens = min(options.max_tokens, config.max_seq_len - max(map(len, prompts)))
    layout = Layout(dp=1, pp=options.pp, tp=options.tp)
    return Request(source.weights, tokenizer, options.prompt, prompts, num_tokens, sampling, layout)


def prompt_problems(texts: Sequence[str], prompts: Sequence[Sequence[int]], config: ModelConfig) -> list[str]:
    """Say which prompts no token can follow, a sentence each.

    Args:
        texts: the prompts.
        prompts: their token ids.
        config: of the model, whose context they have to fit.
    """
    problems = []
    if [] in prompts:
        problems.append("--prompt='': is empty, and the tokenizer puts nothing before it; a longer one would work")
    return problems + [
        f"--prompt={text[:20]!r}…: {len(ids)} tokens, and the model's context of {config.max_seq_len} leaves no room "
        "for another; a shorter one would work"
        for text, ids in zip(texts, prompts, strict=True)
        if len(ids) >= config.max_seq_len
    ]


def _complete(request: Request) -> int:
    """Make the tokens, all ranks together; rank 0 prints them."""
    with joined(request.layout) as device:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        stages, ranks = load_stage(request.weights, request.layout, device, dtype)
        room = max(map(len, request.prompts)) + request.num_tokens
        decoder = StageDecoder(stages, request.weights.config, request.prompts, room, ranks)
        steps = generate(decoder, request.num_tokens, request.tokenizer.ends, request.sampling)
        if is_first():
            _print(request, steps)
        else:
            for _ in steps:
                pass
    return 0


def _print(request: Request, steps: Iterator[list[int | None]]) -> None:
    tokenizer = request.tokenizer
    made: list[list[int]] = [[] for _ in request.prompts]
    alone, shown = len(made) == 1, ""
    if alone:
        print(request.texts[0], end="", flush=True)
    for step in steps:
        for row, token in zip(made, step, strict=True):
            if token is not None:
                row.append(token)
        if alone:
            shown += _say(tokenizer.continuation(request.prompts[0], made[0]), shown)
    if alone:
        print(tokenizer.continuation(request.prompts[0], made[0])[len(shown) :], flush=True)
        return
    for text, prompt, row in zip(request.texts, request.prompts, made, strict=True):
        print(f"--- {text}\n{text}{tokenizer.continuation(prompt, row)}", flush=True)


def _say(text: str, shown: str) -> str:
    """Print what is new of a text whose last character may still be missing bytes; what was printed."""
    new = text[len(shown) :].rstrip("�")
    sys.stdout.write(new)
    sys.stdout.flush()
    return new
