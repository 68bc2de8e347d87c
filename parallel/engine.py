"""A rank of a training run: its layers, its optimizer, its part of the pipeline, and a step of them all.

Everyone else sees `Engine`: `step`, `evaluate`, a decoder, and the four it is made of. DeepSpeed is one file below it,
`parallel/deepspeed_engine.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from model.batch import Batch
from model.config import ModelConfig
from model.loss import SummedLoss
from parallel.build import RankStages, build_stages, drawn, forward_functions
from parallel.decode import StageDecoder
from parallel.environment import quiet
from parallel.groups import Ranks, make_ranks
from parallel.layout import Layout, Recompute
from parallel.pipeline import ActivationSpec, Pipeline
from parallel.schedules import ONE_F_ONE_B, Placement, Schedule
from parallel.sharding import kv_copies
from parallel.simulation import Span
from parallel.stages import Stage
from parallel.tensor import whole_sequences
from parallel.zero import BUCKET, MakeOptimizer, Replicas, Zero


@dataclass(frozen=True)
class EngineSettings:
    """What the engine needs to know besides model and layout.

    Attributes:
        micro_batch: sequences per forward pass of one rank.
        accumulation: micro-batches per optimizer step and rank.
        clip: largest norm of the gradient over all stages, None for no clipping.
        bf16: compute in bf16; else fp32. Master weights, moments and accumulated gradients are fp32 either way.
        seed: of the initial weights.
        seq_len: tokens of a sequence.
        recompute: what blocks compute again in the backward pass.
        head_pieces: of the logits, of which one is held at a time; 1 holds all, and computes none again.
        schedule: the order of passes.
        placement: which rank of a pipeline holds which stages; None for one on each.
        bucket: elements of gradients that travel together, at least.
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
        """That the stages compute in."""
        return torch.bfloat16 if self.bf16 else torch.float32


@dataclass(frozen=True)
class StepResult:
    """What a step came to, the same on every rank but for the last two.

    Attributes:
        loss: mean over all labels that count of the global batch, in nats.
        grad_norm: of the gradient of that mean, over all ranks, before clipping.
        skipped: whether the gradient was not finite, so that no weight moved.
        spans: the passes of this rank, in seconds after `began`; empty where there is one stage.
        began: when the step began here, by the wall clock.
    """

    loss: float
    grad_norm: float
    skipped: bool
    spans: list[Span]
    began: float


class Engine:
    """A rank that trains. All ranks call its methods together.

    Attributes:
        layers: this rank's part of each of its layers, by name, in the order of the model.
        zero: their optimizer.
        pipeline: their passes.
        ranks: this process in the rank grid.
        device: of the layers.
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

        self._model, self._stages, self._accumulation = model, stages, settings.accumulation
        self.layers: Mapping[str, nn.Module] = {layer.name: layer.module for layer in stages.in_order()}
        self.zero, self.pipeline, self.ranks = zero, pipeline, ranks
        self.device = pipeline.spec.device
        self._rate = 0.0
        self._frame = StageEngine(
            list(self.layers.values()), ranks, settings.micro_batch, settings.accumulation, self._train, self._evaluate
        )

    def step(self, batches: Iterator[Batch], rate: float) -> StepResult:
        """Train on the next micro-batches.

        The host waits for the device once, for the loss and the norm.

        Args:
            batches: of this rank's replica; as many as a step has are taken.
            rate: the learning rate.
        """
        self._rate = rate
        return self._frame.train_batch(batches)

    def evaluate(self, batches: Iterator[Batch], micro_batches: int) -> float:
        """The mean loss in nats over all labels that count, of all replicas, without training; NaN if none counts.

        Args:
            batches: of this rank's replica.
            micro_batches: how many to take, as many on every replica.
        """
        return self._frame.eval_batch(batches, num_micro_batches=micro_batches)

    @contextmanager
    def decoder(self, prompts: Sequence[Sequence[int]], room: int) -> Iterator[StageDecoder]:
        """A decoder over the layers as they are now. All ranks enter and leave it together.

        Args:
            prompts: token ids, the same on every rank.
            room: tokens that a sequence may grow to; at most the context.
        """
        stages = {stage: [layer.module for layer in layers] for stage, layers in self._stages.layers.items()}
        with whole_sequences(self.layers.values()):
            yield StageDecoder(stages, self._model, prompts, room, self.ranks)

    def wait(self) -> None:
        """Wait until the weights that travel have arrived."""
        self.zero.wait()

    def _train(self, batches: Iterator[Batch]) -> StepResult:
        loss = self.pipeline.train(batches, self._accumulation)
        total, count, squares = self._over_all_ranks(loss, self.zero.reduce())
        norm = squares.sqrt() / count
        self.zero.update(self._rate, norm, count)
        mean_loss, grad_norm, finite = torch.stack([total / count, norm, norm.isfinite().double()]).tolist()
        spans = self.pipeline.spans() if self.ranks.layout.pp > 1 else []
        return StepResult(mean_loss, grad_norm, not finite, spans, self.pipeline.began)

    def _evaluate(self, batches: Iterator[Batch], micro_batches: int) -> float:
        total, count, _ = self._over_all_ranks(self.pipeline.evaluate(batches, micro_batches), None)
        return float(total / count)

    @torch.no_grad()
    def _over_all_ranks(self, loss: SummedLoss, squares: torch.Tensor | None) -> torch.Tensor:
        """The summed loss, its labels and the squares of the gradient over all ranks, fp64 (3,), in one collective."""
        counted = self.ranks.tp_rank == 0  # of tensor-parallel ranks, all have the same loss
        parts = [loss.total * counted, loss.count.double() * counted, torch.zeros_like(loss.total)]
        sums = torch.stack(parts if squares is None else [*parts[:2], squares])
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
) -> Engine:
    """This rank's engine, its weights drawn, on its device. All ranks call it together.

    Args:
        model: the whole model's shape.
        layout: the rank grid; `start_process_group` has been called on layout.world_size processes.
        stages: of all ranks, as `parallel.stages.split_for` made them for `settings.placement`.
        settings: batch, precision, clipping, seed.
        make_optimizer: from this replica's share of the master weights, matrices and vectors, to its optimizer.
        device: to hold the layers; None for the one that `start_process_group` has returned.
    """
    from parallel.deepspeed_engine import current_device

    device = device or current_device()
    placement = settings.placement or Placement(layout.pp)
    with quiet():
        ranks = make_ranks(layout, placement, kv_copies(model, layout.tp))
        own = {index: range(stages[index].start, stages[index].stop) for index in placement.stages_of(ranks.pp_rank)}
        built = build_stages(model, own, ranks.tensor_parallel, device, drawn(model, settings.seed))
        functions, loss = forward_functions(built, settings.recompute, settings.head_pieces)
        length = settings.seq_len // layout.tp if layout.sequence_parallel else settings.seq_len
        spec = ActivationSpec((settings.micro_batch, length, model.d_model), settings.dtype, device)
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
            torch.cuda.empty_cache()  # the fp32 weights that the buckets were filled from are gone
        return Engine(model, built, ranks, zero, pipeline, settings)
