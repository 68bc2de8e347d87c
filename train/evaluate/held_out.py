"""Held-out sequences by the set they are of, and what a model loses on each: nats, perplexity, bits per byte.

The held-out documents of a mixture are measured source by source: the sequences are those that the mixture takes of
each, so that the loss over all of them is that of the mixture.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from conf.schema import Config
from model.batch import Batch
from model.loss import IGNORED
from parallel.scoring import Request, Score
from train.data.batches import EvalMicroBatches, eval_micro_batches
from train.data.mixed_order import HeldOutSamples, held_out_mixture
from train.data.mixture import Mixture
from train.data.packing import PackedSequences
from train.data.sources import PreparedSources
from train.data.token_bytes import TokenBytes
from train.evaluate.judged import perplexity

_ROWS = 64
"""Sequences that are in memory at a time where their bytes are counted, or requests made of them."""
_REQUESTS = 4096
"""That are scored at a time."""


@dataclass(frozen=True)
class HeldOutSet:
    """Sequences that are measured together.

    Attributes:
        name: of a source of the run, or of a set in `eval.sets`.
        sequences: of which the first `number` are measured.
        number: at least 1.
        end: the token that ends a document.
        document_mask: whether attention and positions stop at the borders of documents.
    """

    name: str
    sequences: PackedSequences
    number: int
    end: int
    document_mask: bool

    def batches(self, micro_batch: int, dp_rank: int = 0, dp_size: int = 1) -> tuple[EvalMicroBatches, int]:
        """Cut the set into the micro-batches of a replica, as `train.data.batches.eval_micro_batches` does."""
        samples = HeldOutSamples({self.name: self.sequences}, Mixture({self.name: 1.0}))
        size = {"micro_batch": micro_batch, "dp_rank": dp_rank, "dp_size": dp_size}
        return eval_micro_batches(samples, self.number, **size, eos_id=self.end, document_mask=self.document_mask)

    def num_bytes(self, table: TokenBytes) -> int:
        """Count the bytes of text that the labels stand for."""
        batches = self.batches(min(_ROWS, self.number))[0]
        return sum(table.of_labels(batch.tokens.numpy(), batch.labels.numpy()) for batch in batches)


@dataclass(frozen=True)
class Loss:
    """What a model loses on a set.

    Attributes:
        nats: summed over the labels.
        labels: that count.
        num_bytes: of text that they stand for.
    """

    nats: float
    labels: int
    num_bytes: int

    @property
    def mean(self) -> float:
        """Nats per label; NaN where none counts."""
        return self.nats / self.labels if self.labels else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers (`train.data.token_bytes`); NaN where there are no bytes."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    def figures(self) -> dict[str, float]:
        """Return what stands in records."""
        return {"loss": self.mean, "perplexity": perplexity(self.mean), "bits_per_byte": self.bits_per_byte}


def together(losses: Sequence[Loss]) -> Loss:
    """Put the losses of several sets together; no label is in two of them."""
    return Loss(
        sum(one.nats for one in losses), sum(one.labels for one in losses), sum(one.num_bytes for one in losses)
    )


def sets_of_run(config: Config, data: PreparedSources) -> list[HeldOutSet]:
    """Return the held-out documents of a run by source: the first train.val_sequences of the mixture.

    A source of which there is none among these has no set.
    """
    held_out, mixture = data.held_out(config), held_out_mixture(config)
    counts = mixture.counts(min(len(held_out), config.train.val_sequences)).tolist()
    how = data.eos_id, bool(config.data.document_mask)
    return [
        HeldOutSet(name, data.by_name[name].val(config.train.seq_len), number, *how)
        for name, number in zip(mixture.names, counts, strict=True)
        if number
    ]


def scored(
    one: HeldOutSet, score: Callable[[Sequence[Request]], Sequence[Score]], table: TokenBytes, seq_len: int
) -> Loss:
    """Measure a set by the log-likelihoods of its documents, with what no engine has evaluated.

    Args:
        one: the set.
        score: of requests.
        table: the bytes of tokens.
        seq_len: of its sequences, by which the documents that are in memory at a time are bounded.
    """
    nats, labels, num_bytes, waiting = 0.0, 0, 0, list[Request]()
    rows = max(1, min(_ROWS, one.number, (1 << 20) // seq_len))
    for batch in one.batches(rows)[0]:
        num_bytes += table.of_labels(batch.tokens.numpy(), batch.labels.numpy())
        waiting += requests_of(batch)
        if len(waiting) >= _REQUESTS:
            nats -= sum(found.log_likelihood for found in score(waiting))
            labels, waiting = labels + sum(len(request.tokens) - 1 for request in waiting), []
    nats -= sum(found.log_likelihood for found in score(waiting))
    return Loss(nats, labels + sum(len(request.tokens) - 1 for request in waiting), num_bytes)


def requests_of(batch: Batch) -> Iterator[Request]:
    """Yield requests whose log-likelihoods are those of a micro-batch: one for each document, or for each sequence."""
    for row, (tokens, labels) in enumerate(zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)):
        begins = [0]
        if batch.documents is not None:
            begins = (batch.documents.positions_BL[row] == 0).nonzero().flatten().tolist()
        for begin, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
            # A label is lost where a document ends without an end token, and where there is padding.
            whole = [tokens[begin], *(label for label in labels[begin:end] if label != IGNORED)]
            if len(whole) > 1:
                yield Request(whole, 1)
