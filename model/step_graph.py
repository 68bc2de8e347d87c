"""Steps of decoding as CUDA graphs: a GPU gets all kernels of a step at once.

A step of one token for each sequence is some twenty kernels a block, most of which take a GPU less time than the host
needs to launch them. A graph is recorded once and launched whole, for as long as all shapes stay what they are.

B sequences, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence

import torch

from model.cache import KVCache

log = logging.getLogger(__name__)


class StepGraph:
    """Runs the steps of a decoder, with a graph wherever one that was recorded fits.

    The first step in which caches have so many places in view runs as it is, so that kernels are compiled and chosen;
    the second is recorded; further ones are that graph. Where no graph can be recorded, which is said, all run as they
    are.

    Args:
        caches: of the blocks that are run.
    """

    def __init__(self, caches: Sequence[KVCache]):
        self._caches = caches
        self._seen: list[int] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tokens_B1 = self._logits_BV = torch.empty(0)
        self._works = True

    def step(self, run: Callable[[torch.Tensor], torch.Tensor], tokens_B1: torch.Tensor) -> torch.Tensor:
        """Run a step, and return its logits (B, V).

        Args:
            run: from the tokens of a step to its logits; it adds the tokens to the caches. It is the same each time,
                and not kept: it may belong to what this object belongs to.
            tokens_B1: int64, on a GPU.
        """
        in_view = [cache.in_view(1) for cache in self._caches]
        if not self._works or in_view != self._seen:
            self._seen, self._graph = in_view, None
            return run(tokens_B1)
        graph = self._graph
        if graph is None:
            longest = [cache.longest for cache in self._caches]
            try:
                graph = self._graph = self._record(run, tokens_B1)
            except RuntimeError as error:  # of a kernel that a graph cannot hold, or of a GPU without memory for it
                self._works = False
                for cache, before in zip(self._caches, longest, strict=True):
                    cache.longest = before
                log.warning("steps are not recorded as a CUDA graph: %s", (str(error).splitlines() or [repr(error)])[0])
                return run(tokens_B1)
        else:
            for cache in self._caches:
                cache.longest += 1  # which the graph does not count
        self._tokens_B1.copy_(tokens_B1)
        graph.replay()
        return self._logits_BV.clone()

    def _record(self, run: Callable[[torch.Tensor], torch.Tensor], tokens_B1: torch.Tensor) -> torch.cuda.CUDAGraph:
        self._tokens_B1 = tokens_B1.clone()
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: one that reads batches ahead, one that saves.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._logits_BV = run(self._tokens_B1)
        return graph
