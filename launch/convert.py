"""Weights from one format into another, and from many key/value heads into few, one tensor in memory at a time."""

import argparse
import sys
from pathlib import Path

import torch

from model.huggingface import open_huggingface
from model.problems import BadInput
from model.regroup import Method, Regrouped
from model.weights import Weights, stored_dtype
from train import pretrained as trained
from train.pretrained import Source

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far logits may be off for the rounding of the weights, of the largest logit."""
CHECKED_TOKENS = 128


def export(options: argparse.Namespace) -> int:
    """Write a Hugging Face directory and compare the logits of what is written with the source's."""
    source = trained.open_source(Path(options.source))
    dtype = getattr(torch, options.dtype)
    tokens_BL = trained.real_tokens(source, CHECKED_TOKENS)
    with trained.new_folder(Path(options.out)) as folder:
        trained.export(source.weights, source, folder, dtype, _bytes(options))
        difference = trained.largest_difference(source.weights, open_huggingface(folder), tokens_BL)
        if not difference <= TOLERANCE[dtype]:
            raise BadInput([f"{options.out}: not written: its logits differ from the source's by {difference:.1e}"])
    _say_what_is_lost(source)
    print(
        f"{options.out}: {source.weights.config.num_params:,} parameters of {source.path} in {options.dtype}; on "
        f"{tokens_BL.numel()} tokens of text its logits are those of the source to {difference:.1e} of the largest"
    )
    return 0


def import_(options: argparse.Namespace) -> int:
    """Take in a Llama-shaped Hugging Face directory."""
    source = trained.open_source(Path(options.source))
    if source.run is not None:
        raise BadInput([f"{options.source}: is a checkpoint of ours already; a Hugging Face directory would work"])
    with trained.new_folder(Path(options.out)) as folder:
        trained.write_checkpoint(source.weights, source, folder, _bytes(options))
    _say_what_is_lost(source)
    if source.weights.tied:
        print(f"{options.out}: its head is tied to the embedding, which training unties", file=sys.stderr)
    if source.tokenizer is None:
        print(f"{options.out}: has no {trained.TOKENIZER}: training takes data.tokenizer=PATH with it", file=sys.stderr)
    print(f"{options.out}: {source.weights.config.num_params:,} parameters of {source.path}; init_from={options.out}")
    return 0


def regroup(options: argparse.Namespace) -> int:
    """Make one key/value head of each group, in the format of the source."""
    source = trained.open_source(Path(options.source))
    try:
        weights = Regrouped(source.weights, options.kv_heads, Method(options.method), options.seed)
    except ValueError as error:
        raise BadInput([str(error)]) from None
    with trained.new_folder(Path(options.out)) as folder:
        if source.run is not None:
            trained.write_checkpoint(weights, source, folder, _bytes(options))
        else:
            trained.export(weights, source, folder, stored_dtype(source.weights), _bytes(options))
    _say_what_is_lost(source)
    print(f"{options.out}: {_heads(source.weights)} to {_heads(weights)} by {options.method}; init_from={options.out}")
    return 0


def _say_what_is_lost(source: Source) -> None:
    for line in trained.left_behind(source):
        print(line, file=sys.stderr)


def _bytes(options: argparse.Namespace) -> int:
    if not options.max_shard_gb > 0:
        raise BadInput([f"--max-shard-gb={options.max_shard_gb}: must be above 0"])
    return int(options.max_shard_gb * 1e9)


def _heads(weights: Weights) -> str:
    return f"{weights.config.n_heads} heads on {weights.config.n_kv_heads}"
