"""The layout of a run: its degrees of parallelism, and the coordinates of each rank."""

from dataclasses import dataclass
from enum import Enum

from model.config import ModelConfig
from model.problems import either, nearest, nearest_multiples
from parallel import schedules, sharding
from parallel.schedules import ONE_F_ONE_B, Placement, Schedule


class Recompute(Enum):
    """The activations that a block's backward pass recomputes instead of saving them in the forward pass."""

    none = "none"
    """Recompute nothing: the fastest, with the most memory."""
    selective = "selective"
    """Recompute the norms' outputs and SwiGLU's product, each by one pass over saved activations."""
    ffn = "ffn"
    """Recompute also the feed-forward network's gate and up products, which take most of a block's memory."""
    full = "full"
    """Recompute everything but the block's input."""


class Balance(Enum):
    """The cost by which stages are balanced."""

    flops = "flops"
    """The forward FLOPs of each layer: known before the run, the same on every machine."""
    measured = "measured"
    """The seconds that a block, the embedding and the head take, timed on rank 0's device before training."""


@dataclass
class ParallelConfig:
    """The settings of parallelism: how a model is cut over processes."""

    pp: int = 1
    """The number of pipeline ranks, one stage on each unless parallel.virtual_stages says more."""
    tp: int = 1
    """The number of tensor-parallel ranks, which share every matrix of a stage. Keep them inside one machine."""
    dp: int | None = None
    """The number of data-parallel replicas of the pipeline; null makes it processes / (pp x tp)."""
    sequence_parallel: bool | None = None
    """Cut norms, residuals and the activations between stages along the sequence too; null is true where tp > 1."""
    schedule: Schedule = ONE_F_ONE_B
    """1f1b, interleaved, zero_bubble, zbv or dualpipev: the order of forward and backward passes (see
    `parallel/schedules.py`). All give the same loss curve."""
    virtual_stages: int | None = None
    """The number of stages on each rank; null is 2 for interleaved, zbv and dualpipev, and 1 for the others."""
    recompute: Recompute = Recompute.none
    """none, selective, ffn or full: the activations that a block's backward pass recomputes."""
    head_pieces: int = 1
    """The number of pieces of the logits, of which one is in memory at a time, recomputed in backward; 1 saves all."""
    balance: Balance = Balance.flops
    """flops or measured: the cost by which the split into stages is balanced."""

    @property
    def placement(self) -> Placement:
        """The placement of the stages on the ranks of a pipeline."""
        return schedules.placement_of(self.schedule, self.pp, self.virtual_stages)


@dataclass(frozen=True)
class Layout:
    """A rank grid of dp x pp x tp processes, in the order of DeepSpeed's topology: tp varies fastest, then dp, then pp.

    Attributes:
        dp: the number of data-parallel replicas.
        pp: the number of pipeline ranks.
        tp: the number of tensor-parallel ranks.
        sequence_parallel: whether norms and residuals are cut along the sequence as well.
    """

    dp: int
    pp: int
    tp: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return self.dp * self.pp * self.tp

    def stage(self, rank: int) -> int:
        """Return the pipeline-parallel rank of a global rank."""
        return rank // (self.dp * self.tp)

    def replica(self, rank: int) -> int:
        """Return the data-parallel rank of a global rank: the index of its replica."""
        return rank // self.tp % self.dp

    def tp_rank(self, rank: int) -> int:
        """Return the tensor-parallel rank of a global rank: the index of its part of every matrix."""
        return rank % self.tp

    def __str__(self) -> str:
        parts = f"dp{self.dp} x pp{self.pp} x tp{self.tp}"
        return parts + (" with sequence parallelism" if self.sequence_parallel else "")


def problems(parallel: ParallelConfig, model: ModelConfig) -> list[str]:
    """Return why this cut is impossible for this model, one sentence each with key, value and what would work."""
    found = schedules.problems(parallel.schedule, parallel.pp, parallel.virtual_stages) if parallel.pp >= 1 else []
    if parallel.pp < 1:
        found.append(f"parallel.pp={parallel.pp}: must be at least 1")
    elif parallel.pp > model.n_layers >= 1:
        found.append(
            f"parallel.pp={parallel.pp}: more stages than the {model.n_layers} layers of the model "
            f"(model.n_layers={model.n_layers}); parallel.pp={model.n_layers} is the most that works"
        )
    placement = parallel.placement if parallel.pp >= 1 and not found else None
    if placement and placement.virtual > 1 and placement.num_stages > model.n_layers + 2 >= 3:
        most = (model.n_layers + 2) // parallel.pp
        works = f"parallel.virtual_stages={most} is the most that works" if most > 1 else "parallel.schedule=1f1b works"
        found.append(
            f"parallel.virtual_stages={placement.virtual}: {placement.num_stages} stages, and the model has "
            f"{model.n_layers + 2} layers with its embedding and head (model.n_layers={model.n_layers}); {works}"
        )
    if parallel.dp is not None and parallel.dp < 1:
        found.append(f"parallel.dp={parallel.dp}: must be at least 1, or null for processes / (pp x tp)")
    if not 1 <= parallel.head_pieces <= max(model.vocab_size, 1):
        works = f"1 to {model.vocab_size}, the vocabulary, would work"
        found.append(f"parallel.head_pieces={parallel.head_pieces}: {works}")
    if not model.problems():
        found += sharding.problems(model, parallel.tp)
    return found


def layout_for(parallel: ParallelConfig, num_processes: int) -> Layout:
    """Return the layout on `num_processes` processes.

    Raises:
        ValueError: the processes cannot be laid out this way; the message says what would work.
    """
    pp, tp, dp = parallel.pp, parallel.tp, parallel.dp
    name = f"parallel.pp={pp} parallel.tp={tp}" if tp > 1 else f"parallel.pp={pp}"
    if dp is None:
        pipeline = pp * tp
        if num_processes % pipeline:
            works = " or ".join(str(count) for count in nearest_multiples(num_processes, pipeline))
            fitting = [p for p in range(1, num_processes + 1) if num_processes % (p * tp) == 0]
            processes = "process" if num_processes == 1 else "processes"
            or_stages = f", or {either('parallel.pp', nearest(fitting, pp))}," if fitting else ""
            raise ValueError(
                f"{name}: {num_processes} {processes} cannot be laid out as pipelines of {pipeline}; "
                f"{works} processes{or_stages} would work"
            )
        dp = num_processes // pipeline
    if dp * pp * tp != num_processes:
        raise ValueError(
            f"parallel.dp={dp}: dp x pp x tp = {dp} x {pp} x {tp} needs {dp * pp * tp} processes, and {num_processes} "
            f"were started; start {dp * pp * tp}, or leave parallel.dp=null"
        )
    sequence_parallel = tp > 1 and parallel.sequence_parallel is not False
    return Layout(dp=dp, pp=pp, tp=tp, sequence_parallel=sequence_parallel)
