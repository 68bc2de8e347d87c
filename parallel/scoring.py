"""Log-likelihoods of token sequences, by forward passes on whatever layout a model lies in.

Requests are packed: each is a document of its own in rows that hold many, between whose borders attention stops, so
that a short request costs what its own tokens cost, whatever the length of the others. A request whose tokens but the
last are the beginning of another's is read off the other's passes: the four answers of one token to a question are
computed once. Answers of several tokens to one question share only what the first of them has in common with each.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from model.batch import Batch
from model.config import ModelConfig
from model.documents import documents_of
from model.weights import Weights
from parallel.build import RankStages, forward_functions, score_function
from parallel.decode import StageDecoder, load_stages
from parallel.groups import Ranks
from parallel.heartbeat import Phase, heart
from parallel.layout import Layout, Recompute
from parallel.pipeline import ActivationSpec, Pipeline
from parallel.schedules import ONE_F_ONE_B
from parallel.tensor import whole_sequences

_ROUND = 16
"""Micro-batches of a round, for each rank of a pipeline. Between rounds the pipeline empties, a sixteenth of the time
of a round; a round's micro-batches and scores are in memory at a time."""
_TOKEN = ">i4"
"""The dtype of tokens whose bytes are in the order of the tokens."""


@dataclass(frozen=True)
class Request:
    """A token sequence, of which those from `first` on are scored, each given all tokens before it.

    Attributes:
        tokens: token ids, at most one more than the model's context.
        first: the index of the first token that is scored, at least 1.
    """

    tokens: Sequence[int]
    first: int


@dataclass(frozen=True)
class Score:
    """The score of a request.

    Attributes:
        log_likelihood: the sum of the log-probabilities of the tokens that are scored, in nats; NaN where the model's
            logits are no numbers.
        greedy: whether each of these tokens is the likeliest one after those before it. Of several that are equally
            likely the one with the smallest id counts as the likeliest.
    """

    log_likelihood: float
    greedy: bool


class Scorer:
    """Scores requests, and decodes, on the ranks of a layout, which call its methods together.

    Args:
        model: the whole model's shape.
        stages: the stages of this rank.
        pipeline: its part of the pipeline, whose passes are run.
        ranks: this process in the rank grid, and its groups.
    """

    def __init__(self, model: ModelConfig, stages: RankStages, pipeline: Pipeline, ranks: Ranks):
        self._model, self._stages, self._pipeline, self._ranks = model, stages, pipeline, ranks
        self._scores = score_function(stages)

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Score requests by the current weights, which stay as they are, as does all state of training.

        A micro-batch has as many tokens as one of training, more only where a single request does. Besides the requests
        themselves, 4 bytes a token and some 300 bytes a request are held in the host's memory, and a round's tokens and
        scores in the device's.

        Args:
            requests: the same on every rank, of any lengths in any order.

        Returns:
            The score of each request, the same on every rank.

        Raises:
            ValueError: on every rank, before any pass: requests that cannot be scored; each is named.
        """
        if problems := request_problems(requests, self._model):
            raise ValueError("\n".join(problems))
        if not requests:
            return []
        layout = self._ranks.layout
        plan = _Plan(requests, self._pipeline.spec, layout)
        found = np.zeros((2, len(requests)))  # log-likelihoods, and tokens that are not the likeliest
        step = _ROUND * layout.pp * layout.dp
        for start in range(0, len(plan.micro_batches), step):
            own = plan.micro_batches[start : start + step][self._ranks.dp_rank :: layout.dp]
            heart.begin_evaluation()
            results = self._pipeline.forward(map(plan.batch, own), len(own), self._scores)
            if self._ranks.tp_rank == 0:  # all that share the vocabulary have found the same
                for rows, (log_probabilities_N, likeliest_N) in zip(own, results, strict=bool(results)):
                    owners = plan.owners(rows)
                    np.add.at(found[0], owners, log_probabilities_N.double().cpu().numpy())
                    np.add.at(found[1], owners, ~likeliest_N.cpu().numpy())
        return [Score(total, not others) for total, others in zip(*self._over_all_ranks(found), strict=True)]

    @contextmanager
    def decoder(self, prompts: Sequence[Sequence[int]], room: int) -> Iterator[StageDecoder]:
        """Decode with the current weights inside this context, which all ranks enter and leave together.

        Args:
            prompts: the token ids of each prompt, the same on every rank.
            room: the most tokens of a sequence, prompt included; at most the model's context.
        """
        with whole_sequences(layer.module for layer in self._stages.in_order()):
            yield StageDecoder(self._stages.modules, self._model, prompts, room, self._ranks)

    def _over_all_ranks(self, found: np.ndarray) -> list[list[float]]:
        heart.at(Phase.EVALUATE)
        if self._ranks.layout.world_size > 1:
            sums = torch.from_numpy(found).to(self._pipeline.spec.device)
            dist.all_reduce(sums)
            return sums.tolist()
        return found.tolist()


def load_scorer(
    weights: Weights, layout: Layout, device: torch.device, dtype: torch.dtype, tokens: int = 8192
) -> Scorer:
    """Load this rank's part of trained weights to score and decode with; all ranks call it together.

    Args:
        weights: the weights of the whole model.
        layout: one replica without sequence parallelism, as for `parallel.decode.load_stages`.
        device: the device of the layers.
        dtype: the dtype of the layers.
        tokens: the number of tokens of a micro-batch.
    """
    stages, ranks = load_stages(weights, layout, device, dtype)
    functions, loss = forward_functions(stages, Recompute.none, head_pieces=1)
    spec = ActivationSpec((1, tokens, weights.config.d_model), dtype, device, tokens)
    pipeline = Pipeline(
        functions,
        loss,
        stages.deferred,
        ONE_F_ONE_B,
        ranks.placement,
        ranks.pp_rank,
        ranks.pipeline,
        ranks.links,
        spec,
    )
    return Scorer(weights.config, stages, pipeline, ranks)


def request_problems(requests: Sequence[Request], model: ModelConfig) -> list[str]:
    """Say which requests cannot be scored, a sentence each."""
    problems = []
    for number, request in enumerate(requests):
        length = len(request.tokens)
        if not 1 <= request.first < length <= model.max_seq_len + 1:
            problems.append(
                f"request {number}: scores the tokens from {request.first} on of {length}; a first one from 1 on and "
                f"below the number of tokens, which is at most {model.max_seq_len + 1}, would work"
            )
        elif min(request.tokens) < 0 or max(request.tokens) >= model.vocab_size:
            problems.append(f"request {number}: token ids from 0 to {model.vocab_size - 1} would work")
    return problems


class _Plan:
    """The micro-batches of requests, the same on every rank.

    Attributes:
        micro_batches: of each the rows, of each row the indices of its documents.
    """

    def __init__(self, requests: Sequence[Request], spec: ActivationSpec, layout: Layout):
        self._requests = requests
        self._documents, self._asked = _documents(requests)
        lengths = [len(one) // 4 for one in self._documents]
        longest = max(lengths)
        assert spec.seq_len is not None
        # Less than a micro-batch of training where some rank of a pipeline would have nothing to do meanwhile.
        fair = -(-sum(lengths) // (2 * layout.pp * layout.dp))
        tokens = max(longest, min(spec.shape[0] * spec.seq_len, fair))
        cut = layout.tp if layout.sequence_parallel else 1
        self._length = -(-max(longest, min(spec.seq_len, tokens)) // cut) * cut
        self._rows = max(tokens // self._length, 1)
        packed = _packed(lengths, self._length)
        self.micro_batches = [packed[at : at + self._rows] for at in range(0, len(packed), self._rows)]

    def batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        """Return a micro-batch (B, L); its labels are int64 (2, N), as `parallel.loss.Scores` wants them.

        What no document fills is a document of its own, of zeros.
        """
        tokens_BL = np.zeros((self._rows, self._length), dtype=np.int64)
        begins_BL = np.zeros(tokens_BL.shape, dtype=bool)
        positions, labels = [], []
        for row, documents in enumerate(rows):
            at = 0
            for one in documents:
                tokens = np.frombuffer(self._documents[one], dtype=_TOKEN)
                tokens_BL[row, at : at + len(tokens)] = tokens
                for index in self._asked[one]:
                    request = self._requests[index]
                    scored = request.tokens[request.first :]
                    begin = row * self._length + at + request.first - 1
                    positions.append(np.arange(begin, begin + len(scored)))
                    labels.append(np.asarray(scored, dtype=np.int64))
                at += len(tokens)
                begins_BL[row, at : at + 1] = True
        asked_2N = np.stack([np.concatenate(positions), np.concatenate(labels)])
        return Batch(torch.from_numpy(tokens_BL), torch.from_numpy(asked_2N), documents_of(torch.from_numpy(begins_BL)))

    def owners(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the index of the request that each label of a micro-batch belongs to."""
        asked = [index for documents in rows for one in documents for index in self._asked[one]]
        return np.repeat(asked, [len(self._requests[index].tokens) - self._requests[index].first for index in asked])


def _documents(requests: Sequence[Request]) -> tuple[list[bytes], list[list[int]]]:
    """Return the token sequences to compute, as bytes of `_TOKEN`, and the requests that each of them answers.

    In the order of their tokens, sequences that begin with another one follow it at once.
    """
    inputs = [np.asarray(request.tokens[:-1], dtype=_TOKEN).tobytes() for request in requests]
    documents: list[bytes] = []
    asked: list[list[int]] = []
    for index in sorted(range(len(requests)), key=inputs.__getitem__, reverse=True):
        if not documents or not documents[-1].startswith(inputs[index]):
            documents.append(inputs[index])
            asked.append([])
        asked[-1].append(index)
    return documents, asked


def _packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack documents into rows of so many tokens: the longest first, each where it leaves the least room."""
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # the room of each row that has some, with its index, in order
    for document in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        at = bisect_left(left, (lengths[document], 0))
        if at < len(left):
            free, row = left.pop(at)
        else:
            free, row = room, len(rows)
            rows.append([])
        rows[row].append(document)
        if free > lengths[document]:
            insort(left, (free - lengths[document], row))
    return rows
