"""The engine of a rank: its layers, its optimizer, its part of the pipeline, and a training step over them.

`Engine` is what other packages use: `step`, `evaluate`, `score`, a decoder, and the parts it consists of. DeepSpeed is
used in one file below it, `parallel/deepspeed_engine.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from model.batch import Batch
from model.config import ModelConfig
from model.loss import SummedLoss
from parallel.build import RankStages, Value, build_stages, forward_functions, initial_values
from parallel.decode import StageDecoder
from parallel.environment import quiet
from parallel.groups import Ranks, make_ranks
from parallel.heartbeat import Phase, heart
from parallel.layout import Layout, Recompute
from parallel.pipeline import ActivationSpec, Pipeline
from parallel.schedules import ONE_F_ONE_B, Placement, Schedule
from parallel.scoring import Request, Score, Scorer
from parallel.sharding import kv_copies
from parallel.simulation import Span
from parallel.stages import Stage
from parallel.zero import BUCKET, MakeOptimizer, Replicas, Zero


@dataclass(frozen=True)
class EngineSettings:
    """The settings of the engine, besides model and layout.

    Attributes:
        micro_batch: the number of sequences per forward pass of one rank.
        accumulation: the number of micro-batches per optimizer step and rank, for steps that do not say it themselves.
        clip: the largest norm of the gradient over all stages, None for no clipping.
        bf16: whether to compute in bf16, else in fp32; master weights, moments and accumulated gradients are fp32.
        seed: the seed of the initial weights.
        seq_len: the number of tokens of a sequence, of which a micro-batch may have more or fewer.
        recompute: the activations that blocks recompute in the backward pass.
        head_pieces: the number of pieces of the logits, of which one is in memory at a time; with 1 none is recomputed.
        schedule: the order of passes.
        placement: the placement of the stages on the ranks of a pipeline; None for one stage on each.
        bucket: the least number of elements whose gradients are reduced together.
    """

    micro_batch: int
    accumulation: int
    clip: float | None
    bf16: bool
    seed: int
    seq_len: int
    recompute: Recompute = Recompute.none
    head_pieces: int = 1
    schedule: Schedule = ONE_F_ONE_B
    placement: Placement | None = None
    bucket: int = BUCKET

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the stages compute."""
        return torch.bfloat16 if self.bf16 else torch.float32


@dataclass(frozen=True)
class Limits:
    """The largest loss, in nats, and the largest gradient norm, before clipping, with which a step updates weights."""

    loss: float = math.inf
    grad_norm: float = math.inf


@dataclass(frozen=True)
class StepResult:
    """The results of a step, the same on every rank but for spans and the time at which the rank began.

    Attributes:
        loss: the mean loss over all labels that count of the global batch, in nats.
        grad_norm: the norm over all ranks of the gradient of that mean, before clipping.
        skipped: whether loss or norm were not finite or above the step's limits, so that no weight was updated.
        attention_flops: the FLOPs of the model's attention, forward and backward, over the documents of the global
            batch, with causal attention halved and whole (`ModelConfig.attention_flops`); sequences count as documents
            where attention does not stop at their borders.
        spans: the passes of this rank, in seconds since `began`.
        began: the wall-clock time at which this rank began the step.
    """

    loss: float
    grad_norm: float
    skipped: bool
    attention_flops: tuple[float, float]
    spans: list[Span]
    began: float


@dataclass(frozen=True)
class EvalResult:
    """The loss of an evaluation, the same on every rank.

    Attributes:
        total: the loss summed over all labels that count, in nats.
        count: the number of these labels.
    """

    total: float
    count: int

    @property
    def mean(self) -> float:
        """Nats per label; NaN where no label counts."""
        return self.total / self.count if self.count else math.nan


class Engine:
    """The engine of one rank. All ranks call its methods together.

    Attributes:
        layers: this rank's part of each of its layers, by name, in the order of the model.
        zero: the optimizer of the layers.
        pipeline: this rank's part of the pipeline.
        ranks: this process in the rank grid, and its groups.
        device: the device of the layers.
    """

    def __init__(
        self,
        model: ModelConfig,
        stages: RankStages,
        ranks: Ranks,
        zero: Zero,
        pipeline: Pipeline,
        settings: EngineSettings,
    ):
        from parallel.deepspeed_engine import StageEngine

        self._model = model
        self._micro_batch, self._accumulation = settings.micro_batch, settings.accumulation
        self.layers: Mapping[str, nn.Module] = {layer.name: layer.module for layer in stages.in_order()}
        self.zero, self.pipeline, self.ranks = zero, pipeline, ranks
        self.device = pipeline.spec.device
        self._scorer = Scorer(model, stages, pipeline, ranks)
        self._rate, self._limits = 0.0, Limits()
        self._frame = StageEngine(
            list(self.layers.values()), ranks, settings.micro_batch, settings.accumulation, self._train, self._evaluate
        )

    def step(
        self, batches: Iterator[Batch], rate: float, micro_batches: int | None = None, limits: Limits | None = None
    ) -> StepResult:
        """Run a training step on the next micro-batches, which have sequences of one length.

        The host waits for the device once, for the loss and the norm.

        Args:
            batches: the micro-batches of this rank's replica, of which those of one step are read.
            rate: the learning rate.
            micro_batches: the number of micro-batches to read, the same on every rank; None for as many as in the step
                before, at first `EngineSettings.accumulation`.
            limits: the limits above which the update is skipped, the same on every rank; None for none.
        """
        self._rate, self._limits = rate, limits or Limits()
        if micro_batches is not None and micro_batches != self._accumulation:
            self._accumulation = micro_batches
            self._frame.set_train_batch_size(self._micro_batch * micro_batches * self.ranks.layout.dp)
            self.zero.expect(micro_batches)
        return self._frame.train_batch(batches)

    def evaluate(self, batches: Iterator[Batch], micro_batches: int) -> EvalResult:
        """Compute the loss over all labels that count, of all replicas.

        Args:
            batches: the micro-batches of this rank's replica.
            micro_batches: the number of micro-batches to read, the same on every replica.
        """
        return self._frame.eval_batch(batches, num_micro_batches=micro_batches)

    def score(self, requests: Sequence[Request]) -> list[Score]:
        """Score token sequences by the current weights, as `parallel.scoring.Scorer.score` does."""
        return self._scorer.score(requests)

    def decoder(self, prompts: Sequence[Sequence[int]], room: int) -> AbstractContextManager[StageDecoder]:
        """Decode with the current weights, as `parallel.scoring.Scorer.decoder` does."""
        return self._scorer.decoder(prompts, room)

    def wait(self) -> None:
        """Wait until the weight gather has finished."""
        self.zero.wait()

    def _train(self, batches: Iterator[Batch]) -> StepResult:
        loss = self.pipeline.train(batches, self._accumulation)
        heart.at(Phase.REDUCE)
        own_squares = self.zero.reduce()
        heart.at(Phase.AGREE)
        total, count, squares, *flops = self._over_all_ranks(loss, own_squares)
        heart.at(Phase.UPDATE)
        mean, norm = total / count, squares.sqrt() / count
        # Of figures that all ranks have alike, so that each decides as the others do; the host learns of it below.
        sound = mean.isfinite() & norm.isfinite() & (mean <= self._limits.loss) & (norm <= self._limits.grad_norm)
        self.zero.update(self._rate, norm, count, sound)
        mean_loss, grad_norm, updated, halved, whole = torch.stack([mean, norm, sound.double(), *flops]).tolist()
        return StepResult(
            mean_loss, grad_norm, not updated, (halved, whole), self.pipeline.spans(), self.pipeline.began
        )

    def _evaluate(self, batches: Iterator[Batch], micro_batches: int) -> EvalResult:
        heart.begin_evaluation()
        loss = self.pipeline.evaluate(batches, micro_batches)
        heart.at(Phase.EVALUATE)
        total, count, *_ = self._over_all_ranks(loss, None).tolist()
        return EvalResult(total, int(count))

    @torch.no_grad()
    def _over_all_ranks(self, loss: SummedLoss, squares: torch.Tensor | None) -> torch.Tensor:
        """Sum over all ranks in one collective: the loss, its labels, the squares of gradients, attention's FLOPs.

        Tensor-parallel ranks all have the same loss, and all ranks of a pipeline the same documents.

        Returns:
            fp64 (5,).
        """
        counted = self.ranks.tp_rank == 0
        trained = counted and squares is not None and self.pipeline.loss is not None
        flops = self._model.attention_flops(self.pipeline.lengths if trained else ())
        sums = torch.stack(
            [
                loss.total * counted,
                loss.count.double() * counted,
                torch.zeros_like(loss.total) if squares is None else squares,
                *(torch.full_like(loss.total, number) for number in flops),
            ]
        )
        if self.ranks.layout.world_size > 1:
            dist.all_reduce(sums)
        return sums


def build_engine(
    model: ModelConfig,
    layout: Layout,
    stages: Sequence[Stage],
    settings: EngineSettings,
    make_optimizer: MakeOptimizer,
    device: torch.device | None = None,
    value: Value | None = None,
) -> Engine:
    """Build this rank's engine on its device, with initial weights. All ranks call it together.

    Args:
        model: the whole model's shape.
        layout: the rank grid; `start_process_group` has been called on layout.world_size processes.
        stages: the stages of all ranks, as `parallel.stages.split_for` returns them for `settings.placement`.
        settings: the settings of the engine.
        make_optimizer: makes the optimizer of this replica's share of the master weights, matrices and vectors.
        device: the device of the layers; None for the one that `start_process_group` has returned.
        value: the value of each parameter; None draws initial values by `settings.seed`.
    """
    from parallel.deepspeed_engine import current_device

    device = device or current_device()
    placement = settings.placement or Placement(layout.pp)
    with quiet():
        ranks = make_ranks(layout, placement, kv_copies(model, layout.tp))
        own = {index: range(stages[index].start, stages[index].stop) for index in placement.stages_of(ranks.pp_rank)}
        value = value or initial_values(model, settings.seed)
        built = build_stages(model, own, ranks.tensor_parallel, device, value)
        functions, loss = forward_functions(built, settings.recompute, settings.head_pieces)
        length = settings.seq_len // layout.tp if layout.sequence_parallel else settings.seq_len
        shape = (settings.micro_batch, length, model.d_model)
        spec = ActivationSpec(shape, settings.dtype, device, settings.seq_len)
        pipeline = Pipeline(
            functions,
            loss,
            built.deferred,
            settings.schedule,
            placement,
            ranks.pp_rank,
            ranks.pipeline,
            ranks.links,
            spec,
        )
        zero = Zero(
            built.in_order(),
            make_optimizer,
            dtype=settings.dtype,
            micro_batches=settings.accumulation,
            clip=settings.clip,
            replicas=Replicas(ranks.dp, ranks.dp_rank, layout.dp),
            sharing=ranks.sharing,
            bucket=settings.bucket,
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the fp32 weights that the buckets were filled from have been freed
        return Engine(model, built, ranks, zero, pipeline, settings)
