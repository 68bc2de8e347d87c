"""Weights from one format into another, and from many key/value heads into few, one tensor in memory at a time."""

import argparse
import sys
from pathlib import Path

import torch

from launch.speech import tokenizer_of
from model.huggingface import open_huggingface
from model.problems import BadInput, either
from model.regroup import Method, Regrouped, problem_of
from model.weights import Weights, stored_dtype
from train import pretrained as trained
from train.pretrained import Source

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far logits may be off for the rounding of the weights, of the largest logit."""
CHECKED_TOKENS = 128
CALIBRATION_TOKENS = 16384
"""Of the text of `regroup --calibrate` that run through the model; more than any block has channels of keys."""
_CHARACTERS = 32
"""Of text that are read for each token."""


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
    source, method = trained.open_source(Path(options.source)), Method(options.method)
    problem = problem_of(source.weights.config, options.kv_heads)
    problems = [*([problem] if problem else []), *_shard_problems(options)]
    if options.calibrate is not None and not method.by_similarity:
        works = either("--method", [one.value for one in Method if one.by_similarity])
        problems.append(f"--calibrate={options.calibrate}: --method={method.value} compares no heads; {works} would")
    elif options.calibrate is not None and source.tokenizer is None:
        problems.append(f"{source.path}: {trained.TOKENIZER} is missing, with which --calibrate is read")
    if problems:
        raise BadInput(problems)
    with trained.new_folder(Path(options.out)) as folder:  # which is refused before heads are compared, a long work
        rows_BL = None if options.calibrate is None else _calibration_rows(source, options.calibrate)
        weights = Regrouped(source.weights, options.kv_heads, method, options.seed, rows_BL)
        if source.run is not None:
            trained.write_checkpoint(weights, source, folder, _bytes(options))
        else:
            trained.export(weights, source, folder, stored_dtype(source.weights), _bytes(options))
    _say_what_is_lost(source)
    print(f"{options.out}: {_heads(source.weights)} to {_heads(weights)} by {options.method}; init_from={options.out}")
    if weights.merges:
        print(_similarity(weights, rows_BL))
    return 0


def _calibration_rows(source: Source, file: Path) -> torch.Tensor:
    """Encode the beginning of a text in rows as long as the model's context, int64 (B, L).

    Raises:
        BadInput: it cannot be read, or has no two tokens.
    """
    works = "a text file in UTF-8 would work"
    try:
        with open(file, encoding="utf-8") as text:
            tokens = tokenizer_of(source).encode(text.read(_CHARACTERS * CALIBRATION_TOKENS))[:CALIBRATION_TOKENS]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise BadInput([f"--calibrate={file}: {why}; {works}"]) from None
    if len(tokens) < 2:
        raise BadInput(
            [f"--calibrate={file}: has only {len(tokens)} tokens; text of {CALIBRATION_TOKENS:,} would work"]
        )
    length = min(len(tokens), source.weights.config.max_seq_len)
    return torch.tensor(tokens[: len(tokens) // length * length]).unflatten(0, (-1, length))


def _similarity(weights: Regrouped, rows_BL: torch.Tensor | None) -> str:
    """Say how heads were grouped by similarity, and what is lost."""
    merges, size = weights.merges, weights.config.n_kv_heads
    same = sum(group == tuple(range(group[0], group[-1] + 1)) for merge in merges for group in merge.groups)
    by = "weights" if rows_BL is None else f"keys and values of {rows_BL.numel():,} tokens"
    keys, values = (
        sum(getattr(merge, which) for merge in merges) / len(merges) for which in ("lost_keys", "lost_values")
    )
    return (
        f"heads were compared by {by}; {same} of {len(merges) * size} groups are of neighbours; of their squares, "
        f"{keys:.1%} of keys' and {values:.1%} of values' are lost, the mean of {len(merges)} blocks"
    )


def _say_what_is_lost(source: Source) -> None:
    for line in trained.left_behind(source):
        print(line, file=sys.stderr)


def _shard_problems(options: argparse.Namespace) -> list[str]:
    wrong = f"--max-shard-gb={options.max_shard_gb:g}: must be above 0; 5 would work"
    return [] if options.max_shard_gb > 0 else [wrong]


def _bytes(options: argparse.Namespace) -> int:
    if problems := _shard_problems(options):
        raise BadInput(problems)
    return int(options.max_shard_gb * 1e9)


def _heads(weights: Weights) -> str:
    return f"{weights.config.n_heads} heads on {weights.config.n_kv_heads}"
