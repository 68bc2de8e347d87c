"""Trained weights in one process: loading them, text from them, and their loss on text."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import overload

import torch

from conf.compose import stored_config
from conf.paths import checked
from launch.generate import prompt_problems
from launch.speech import Tokenizer, tokenizer_of
from model.batch import Batch
from model.context import Context
from model.generate import Decoder, Sampling, complete
from model.loss import IGNORED, SummedLoss, cross_entropy
from model.problems import BadInput, not_utf8
from model.transformer import Transformer
from train.pretrained import open_source

_TOKENS_AT_A_TIME = 4096
"""Logits of so many tokens are held at once; with 100,000 tokens in the vocabulary, 1.6 GB in fp32."""


def load(
    source: str | PathLike[str],
    *,
    tokenizer: str | PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Transformer, Tokenizer]:
    """Load trained weights.

        model, tokenizer = deepnarrow.load("runs/tiny-stdlib-574187f", device="cpu")
        logits_BLV = model(torch.tensor([tokenizer.encode("def ")]))

    Args:
        source: a run folder, whose newest sound checkpoint is taken, a checkpoint, or a Llama-shaped Hugging Face
            directory.
        tokenizer: a tokenizer.json, or a folder with one; None takes the one beside the weights.
        device: where the weights go; None is the GPU where there is one, else the CPU.
        dtype: of the weights; None is bfloat16 on a GPU and float32 on the CPU.

    Returns:
        The model in evaluation mode, from token ids, int64 (B, L), to logits (B, L, V); and its tokenizer.

    Raises:
        BadInput: nothing is there, or it is damaged or of another shape, or has no tokenizer.
    """
    found = open_source(source)
    spoken = tokenizer_of(found, None if tokenizer is None else checked("tokenizer", tokenizer))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    with torch.device("meta"):
        model = Transformer(found.weights.config)
    model = model.to(dtype).to_empty(device=device).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(found.weights.read(name))
    return model, spoken


@overload
def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: str,
    *,
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 1,
) -> str: ...
@overload
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 1,
) -> list[str]: ...
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 1,
) -> str | list[str]:
    """Complete prompts, as ``deepnarrow generate`` does: with the same seed, the same text.

        deepnarrow.generate(model, tokenizer, "def ", temperature=0)
        deepnarrow.generate(model, tokenizer, ["def ", "import "], max_tokens=20, top_p=0.9, seed=7)

    Args:
        model: from `load`.
        tokenizer: from `load`.
        prompts: a text, or several that are completed together.
        max_tokens: at most so many tokens follow each; the model's context may end before.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from so many of the likeliest; None from all.
        top_p: draw from the fewest tokens that together are at least so likely.
        seed: of the draws.

    Returns:
        Each prompt with what follows it; of one text, one text.

    Raises:
        BadInput: a value is impossible, or a prompt is empty or leaves no room in the context; by argument.
    """
    texts = [prompts] if isinstance(prompts, str) else [*prompts]
    sampling, context = Sampling(temperature, top_k, top_p, seed), model.config.max_seq_len
    problems = sampling.problems() + [problem for text in texts for problem in not_utf8("--prompt", text)]
    if max_tokens < 1:
        problems.append(f"--max-tokens={max_tokens}: must be at least 1")
    if not problems:
        ids = [tokenizer.encode(text) for text in texts]
        problems = prompt_problems(texts, ids, model.config)
    if problems:
        raise BadInput([re.sub(r"--([\w-]+)", lambda option: option[1].replace("-", "_"), text) for text in problems])
    if not texts:
        return []
    longest = max(map(len, ids))
    num_tokens = min(max_tokens, context - longest)
    decoder = Decoder([model.embedding, *model.blocks, model.head], ids, longest + num_tokens)
    made = complete(decoder, num_tokens, tokenizer.ends, sampling)
    whole = [text + tokenizer.continuation(*row) for text, row in zip(texts, zip(ids, made, strict=True), strict=True)]
    return whole[0] if isinstance(prompts, str) else whole


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts tokens.

    Attributes:
        loss: nats per token, the mean over all tokens that were predicted.
        num_tokens: how many those were.
    """

    loss: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: str | Iterable[str] | None = None,
    *,
    held_out: str | PathLike[str] | None = None,
) -> Evaluation:
    """Measure the loss of a model on texts, or on what a run has held out.

        deepnarrow.evaluate(model, tokenizer, ["import os\\n", "def main():\\n"]).perplexity
        deepnarrow.evaluate(model, tokenizer, held_out="runs/tiny-stdlib-574187f").loss    # the run's validation loss

    Args:
        model: from `load`.
        tokenizer: from `load`.
        texts: each is a document of its own, predicted from what `tokenizer.encode` puts before it; where that is
            nothing, its first token is not predicted. One that is longer than the model's context is cut into pieces of
            that length, each predicted without those before it. The end of a text is not predicted.
        held_out: a run or one of its checkpoints, whose held-out sequences are predicted as its validation does it
            (train.val_sequences, train.seq_len). Its corpus has to be where it was, relative paths included, or
            prepared in the cache.

    Returns:
        Nats per token, and the number of tokens.

    Raises:
        BadInput: neither or both of texts and held_out are given, or there is no token to predict.
    """
    if (texts is None) == (held_out is None):
        raise BadInput(["texts, held_out: one of the two says what is to be predicted; give one, and not the other"])
    if held_out is not None:
        batches = _held_out(held_out)
    else:
        batches = _batches_of([texts] if isinstance(texts, str) else texts or [], tokenizer, model.config.max_seq_len)
    total, count = 0.0, 0
    for batch in batches:
        found = _loss(model, batch)
        total, count = total + float(found.total), count + int(found.count)
    if not count:
        said = f"held_out={held_out}: nothing is held out" if held_out else "texts: there is no token to predict"
        raise BadInput([f"{said}; text of two tokens or more would work"])
    return Evaluation(total / count, count)


@torch.no_grad()
def _loss(model: Transformer, batch: Batch) -> SummedLoss:
    batch = batch.to(model.head.proj.weight.device)
    return cross_entropy(model(batch.tokens, Context(documents=batch.documents)), batch.labels)


def _batches_of(texts: Iterable[str], tokenizer: Tokenizer, context: int) -> Iterator[Batch]:
    """Cut texts into rows no longer than the context, and put rows side by side, the shorter ones padded."""
    texts = [*texts]
    if problems := [problem for text in texts for problem in not_utf8("texts", text)]:
        raise BadInput(problems)
    each = (tokenizer.encode(text) for text in texts)
    rows = (ids[at : at + context + 1] for ids in each for at in range(0, len(ids) - 1, context))
    while some := list(itertools.islice(rows, max(1, _TOKENS_AT_A_TIME // context))):
        longest = max(map(len, some)) - 1
        tokens_BL = torch.zeros(len(some), longest, dtype=torch.int64)
        labels_BL = torch.full((len(some), longest), IGNORED)
        for number, ids in enumerate(some):
            tokens_BL[number, : len(ids) - 1] = torch.tensor(ids[:-1])
            labels_BL[number, : len(ids) - 1] = torch.tensor(ids[1:])
        yield Batch(tokens_BL, labels_BL)


def _held_out(run: str | PathLike[str]) -> Iterator[Batch]:
    from train.data.batches import eval_micro_batches
    from train.data.sources import prepare_run

    source = open_source(run, checked=False, key="held_out")
    if source.run is None or "data" not in source.run.config:
        raise BadInput([f"held_out={Path(run)}: no run of deepnarrow, which holds text out; a run folder would work"])
    config = stored_config(source.run.config)
    data = prepare_run(config, progress=False)
    rows = max(1, _TOKENS_AT_A_TIME // config.train.seq_len)
    batches, _ = eval_micro_batches(
        data.held_out(config),
        config.train.val_sequences,
        micro_batch=rows,
        dp_rank=0,
        dp_size=1,
        eos_id=data.eos_id,
        document_mask=bool(config.data.document_mask),
    )
    return iter(batches)
