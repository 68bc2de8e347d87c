"""How many ways a run is cut, and which rank holds what."""

from dataclasses import dataclass
from enum import Enum

from model.config import ModelConfig, either


class Balance(Enum):
    """What the stages are balanced by."""

    flops = "flops"
    """The forward FLOPs of each layer: known before anything runs, the same everywhere."""
    measured = "measured"
    """The seconds that a block, the embedding and the head take, timed on rank 0's device before training."""


@dataclass
class ParallelConfig:
    """The cut over processes."""

    pp: int = 1
    """Pipeline stages."""
    dp: int | None = None
    """Data-parallel replicas of the pipeline; null makes it processes / pp."""
    balance: Balance = Balance.flops
    """flops or measured: what the split into stages is balanced by."""


@dataclass(frozen=True)
class Layout:
    """A rank grid of dp x pp processes; neighbouring ranks are replicas of one stage, as in DeepSpeed's topology."""

    dp: int
    pp: int

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.dp * self.pp

    def stage(self, rank: int) -> int:
        """The pipeline stage of a rank."""
        return rank // self.dp

    def replica(self, rank: int) -> int:
        """Which of the dp replicas a rank belongs to."""
        return rank % self.dp

    def __str__(self) -> str:
        return f"dp{self.dp} x pp{self.pp}"


def problems(parallel: ParallelConfig, model: ModelConfig) -> list[str]:
    """Why this cut is impossible for this model, one sentence each with key, value and what would work."""
    found = []
    if parallel.pp < 1:
        found.append(f"parallel.pp={parallel.pp}: must be at least 1")
    elif parallel.pp > model.n_layers >= 1:
        found.append(
            f"parallel.pp={parallel.pp}: more stages than the {model.n_layers} layers of the model "
            f"(model.n_layers={model.n_layers}); parallel.pp={model.n_layers} is the most that works"
        )
    if parallel.dp is not None and parallel.dp < 1:
        found.append(f"parallel.dp={parallel.dp}: must be at least 1, or null for processes / pp")
    return found


def layout_for(parallel: ParallelConfig, num_processes: int) -> Layout:
    """The layout on `num_processes` processes.

    Raises:
        ValueError: the processes cannot be laid out this way; says what would work.
    """
    pp, dp = parallel.pp, parallel.dp
    if dp is None:
        if num_processes % pp:
            counts = [n for n in (num_processes // pp * pp, -(-num_processes // pp) * pp) if n]
            works = " or ".join(str(n) for n in counts)
            stages = [p for p in range(1, num_processes + 1) if num_processes % p == 0]
            nearest = sorted(stages, key=lambda p: abs(p - pp))[:2]
            raise ValueError(
                f"parallel.pp={pp}: {num_processes} processes cannot be laid out as pipelines of {pp} stages; "
                f"{works} processes, or {either('parallel.pp', sorted(nearest))}, would work"
            )
        dp = num_processes // pp
    if dp * pp != num_processes:
        raise ValueError(
            f"parallel.dp={dp}: dp x pp = {dp} x {pp} needs {dp * pp} processes, and {num_processes} were started; "
            f"start {dp * pp}, or leave parallel.dp=null"
        )
    return Layout(dp=dp, pp=pp)
