"""Rank 0 leads: it runs the tasks, and the other ranks compute with it what it asks of the model.

So a task reads files, formats and fails on one process alone, and ranks are never at different questions. What an
answer of the model takes is broadcast over the CPU, 4 bytes a token.
"""

from array import array
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch.distributed as dist

from model.config import ModelConfig
from model.generate import Decoder, Sampling, complete
from parallel.heartbeat import Phase, heart
from parallel.scoring import Request, Score, request_problems
from train.agreement import from_rank_0

T = TypeVar("T")


class Model(Protocol):
    """A model on whatever layout, whose methods all ranks call together: `parallel.engine.Engine` is one."""

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Compute the log-likelihoods that requests ask for."""

    def decoder(self, prompts: Sequence[Sequence[int]], room: int) -> AbstractContextManager[Decoder]:
        """Decode behind prompts, with room for so many tokens in all."""


class Leader:
    """What rank 0 asks the model with; each method is one collective of all ranks.

    Args:
        model: of this rank.
        config: of the whole model, by which requests are judged before a rank is told of them.
        group: of all ranks, over the CPU; None for a process alone.

    Attributes:
        broken: whether the model has failed, so that nobody knows where the other ranks are.
    """

    def __init__(self, model: Model, config: ModelConfig, group: dist.ProcessGroup | None):
        self._model, self._config, self._group, self.broken = model, config, group, False

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Compute the log-likelihoods that requests ask for, in their order.

        Raises:
            ValueError: requests that cannot be scored; no other rank is told of any.
        """
        if problems := request_problems(requests, self._config):
            raise ValueError("\n".join(problems))
        tokens = np.concatenate([np.asarray(one.tokens, np.int32) for one in requests] or [np.empty(0, np.int32)])
        cuts = np.array([(len(one.tokens), one.first) for one in requests], np.int32).reshape(-1, 2)
        return list(self._together(_score, tokens, cuts))

    def complete(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, ends: Collection[int], sampling: Sampling
    ) -> list[list[int]]:
        """Complete prompts together as `model.generate.complete` does, with so many tokens at most.

        Raises:
            ValueError: prompts that are empty or, with so many tokens, do not fit the context; no other rank is told.
        """
        if not prompts:
            return []
        if not all(1 <= len(prompt) <= self._config.max_seq_len - num_tokens for prompt in prompts):
            raise ValueError(
                f"prompts of 1 to {self._config.max_seq_len - num_tokens} tokens leave room for {num_tokens}"
            )
        return list(self._together(_complete, [list(prompt) for prompt in prompts], num_tokens, sorted(ends), sampling))

    def _together(self, work: Callable[..., Any], *arguments: Any) -> Any:
        self._tell((work, arguments))
        self.broken = True
        found = work(self._model, *arguments)
        self.broken = False
        heart.at(Phase.TASKS)
        return found

    def end(self, failure: str | None = None) -> None:
        """Let the other ranks go, which raise what has failed if anything has."""
        self._tell((None, failure))

    def _tell(self, what: Any) -> None:
        if self._group is not None:
            from_rank_0(what, self._group)


def led(model: Model, config: ModelConfig, group: dist.ProcessGroup | None, work: Callable[[Leader], T]) -> T | None:
    """Run work on rank 0, which asks the model as it likes. All ranks call it together.

    Args:
        model: of this rank.
        config: of the whole model.
        group: of all ranks, over the CPU; None for a process alone.
        work: is called on rank 0 alone.

    Returns:
        What it returns; None elsewhere.

    Raises:
        RuntimeError: elsewhere, what work raises on rank 0; where the model itself fails, all of its ranks are lost.
    """
    heart.begin_evaluation()
    if group is not None and dist.get_rank() != 0:
        _follow(model, group)
        return None
    leader, failure = Leader(model, config, group), None
    heart.at(Phase.TASKS)
    try:
        return work(leader)
    except BaseException as error:
        failure = f"rank 0 failed: {type(error).__name__}: {error}"
        raise
    finally:
        if not leader.broken:
            leader.end(failure)
        heart.at(Phase.EVALUATE)


def _follow(model: Model, group: dist.ProcessGroup) -> None:
    """Compute what rank 0 asks for until it lets this rank go."""
    while True:
        heart.at(Phase.EVALUATE)
        work, arguments = from_rank_0((None, None), group)
        if work is None:
            if arguments is not None:
                raise RuntimeError(arguments)
            return
        work(model, *arguments)


def _score(model: Model, tokens: np.ndarray, cuts: np.ndarray) -> list[Score]:
    ends = np.cumsum(cuts[:, 0])
    requests = [
        Request(array("i", tokens[end - length : end].tobytes()), first)
        for end, (length, first) in zip(ends.tolist(), cuts.tolist(), strict=True)
    ]
    return model.score(requests)


def _complete(
    model: Model, prompts: list[list[int]], num_tokens: int, ends: list[int], sampling: Sampling
) -> list[list[int]]:
    with model.decoder(prompts, max(map(len, prompts)) + num_tokens) as decoder:
        return complete(decoder, num_tokens, ends, sampling)
