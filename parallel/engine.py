"""A rank's stages on DeepSpeed's pipeline engine: the rank grid, the batch, and the loss that all ranks get.

Ours are the passes of a step (`parallel/pipeline.py`), the optimizer and its sharding over the replicas
(`parallel/zero.py`), which layers a rank holds, and that each is built by itself and starts from (seed, full name).
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from model.config import ModelConfig
from model.init import initial_value
from model.transformer import Block, Head, layer_builders
from parallel.layout import Layout, Recompute
from parallel.loss import head_and_loss, vocabulary_shard_of_rank
from parallel.pipeline import Hop, Pipeline, make_links
from parallel.recompute import recomputing
from parallel.schedules import ONE_F_ONE_B, Placement, Schedule
from parallel.sharding import kv_copies, vocabulary_shard
from parallel.stages import Stage
from parallel.tensor import TensorParallel, build_layer
from parallel.zero import BUCKET, MakeOptimizer, Replicas, Zero

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.module import PipelineModule

# Importing DeepSpeed takes seconds and asks for a launcher's environment; whoever only needs types must not pay that.


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
        place: which rank of a pipeline holds which stages; None for one on each.
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
    place: Placement | None = None
    bucket: int = BUCKET

    @property
    def dtype(self) -> torch.dtype:
        """That the stages compute in."""
        return torch.bfloat16 if self.bf16 else torch.float32


def start_process_group() -> torch.device:
    """Join the processes that the launcher started (RANK, WORLD_SIZE, MASTER_ADDR ... in the environment).

    Returns:
        This rank's device: its GPU by LOCAL_RANK, or the CPU.
    """
    # Said once per collective and process; the names that replace them are not in every torch that is supported.
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use", category=FutureWarning)
    name_accelerator(os.environ)
    with quiet():
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        # On the CPU DeepSpeed would compile a shared-memory collective for 100 s, which leaks /dev/shm for good.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        on_gpu = get_accelerator().device_name() == "cuda"
        if on_gpu:
            get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
        deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False)
        return _device()


def name_accelerator(environment: MutableMapping[str, str]) -> None:
    """Say in an environment that DeepSpeed is to run on the CPU, where there is nothing else: unasked, it warns."""
    if not torch.accelerator.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")


def build_engine(
    model: ModelConfig,
    layout: Layout,
    stages: Sequence[Stage],
    settings: EngineSettings,
    make_optimizer: MakeOptimizer,
) -> "PipelineEngine":
    """This rank's stage, initialised, on its device, with its optimizer. All ranks call it together.

    Args:
        model: the whole model's shape.
        layout: the rank grid; `start_process_group` has been called on layout.world_size processes.
        stages: of all ranks, as `parallel.stages.split_for` made them for `settings.place`.
        settings: batch, precision, clipping, seed.
        make_optimizer: from this replica's share of the master weights, matrices and vectors, to its optimizer.
    """
    with quiet():
        import deepspeed

        place = settings.place or Placement(layout.pp)
        module = _stage_module(model, layout, stages, settings, place)
        engine, *_ = deepspeed.initialize(model=module, config=_deepspeed_config(layout, settings))
        engine.optimizer = Zero(
            (layer for name, layer in module.named_children() if name.isdigit()),
            make_optimizer,
            dtype=settings.dtype,
            micro_batches=settings.accumulation,
            clip=settings.clip,
            replicas=Replicas(engine.grid.get_data_parallel_group(), layout.replica(dist.get_rank()), layout.dp),
            sharing=module.tp.sharing,
            bucket=settings.bucket,
        )
        # Replicas, and within them tensor-parallel ranks, each have a pipeline of their own.
        step = layout.dp * layout.tp
        pipelines = [[first + stage * step for stage in range(layout.pp)] for first in range(step)]
        links = make_links(place, pipelines, engine.grid.get_pipe_parallel_group())
    length = settings.seq_len // layout.tp if layout.sequence_parallel else settings.seq_len
    engine.pipeline = Pipeline(
        module.stages,
        module.loss_fn,
        settings.schedule,
        place,
        engine.stage_id,
        pipelines[dist.get_rank() % step],
        links,
        Hop((settings.micro_batch, length, model.d_model), settings.dtype, engine.device),
    )
    # DeepSpeed's own schedules come in here; what of it is kept is what surrounds them.
    engine._exec_schedule = MethodType(_run_schedule, engine)
    return engine


def _run_schedule(engine: "PipelineEngine", asked: Any) -> None:
    """A step, or an evaluation, in the place of DeepSpeed's: our passes, and our optimizer's step."""
    from deepspeed.runtime.pipe.schedule import TrainSchedule

    pipeline, training = engine.pipeline, isinstance(asked, TrainSchedule)
    losses = (pipeline.train if training else pipeline.evaluate)(engine.data_iterator, asked.micro_batches)
    # DeepSpeed looks for the losses on the last rank of the pipeline, and they are where the last stage is.
    source, last = pipeline.loss_rank, engine.num_stages - 1
    if source != last:
        shared = torch.stack(losses) if losses else torch.empty(asked.micro_batches, device=engine.device)
        dist.broadcast(shared, src=engine.grid.stage_to_global(source), group=engine.grid.get_pipe_parallel_group())
        losses = list(shared)
    engine.fwd_outputs = losses
    if not training:
        return
    engine.total_loss = torch.stack(losses).sum() if losses else None
    engine.optimizer.step()
    engine._global_grad_norm = engine.optimizer.norm


def named_parameters(engine: "PipelineEngine", model: ModelConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of this rank's stage by their full names, the same in every layout."""
    names = list(layer_builders(model))
    for name, parameter in engine.module.named_parameters():
        index, _, inner = name.partition(".")  # DeepSpeed names a layer by its index in the whole model
        yield f"{names[int(index)]}.{inner}", parameter


def _stage_module(
    model: ModelConfig, layout: Layout, stages: Sequence[Stage], settings: EngineSettings, place: Placement
) -> "PipelineModule":
    from deepspeed.runtime.pipe.module import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    def drawn(name: str, shape: torch.Size) -> torch.Tensor:
        return initial_value(name, shape, settings.seed, model.init_std)

    class StageModule(PipelineModule):
        """The layers of a rank's stages, by the bounds that `parallel.stages` found and in DeepSpeed's terms."""

        tp: TensorParallel
        stages: dict[int, list[Any]]

        def _partition_layers(self, method: str = "") -> None:
            # Bounds for DeepSpeed to hold; of several stages on a rank it knows nothing.
            self.parts = [min(rank, len(self._layer_specs)) for rank in range(layout.pp)] + [len(self._layer_specs)]
            self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

        def _build(self) -> None:
            self.tp = _tensor_parallel(model, layout, self._grid.get_slice_parallel_group())
            builders, self.stages = list(layer_builders(model).items()), {}
            for stage in place.stages_of(self.stage_id):
                functions = self.stages[stage] = []
                for index in range(stages[stage].start, stages[stage].stop):
                    name, build = builders[index]
                    layer = build_layer(build, f"{name}.", model, self.tp, _device(), drawn)
                    self.add_module(str(index), layer)
                    if isinstance(layer, Block):
                        functions.append(recomputing(layer, settings.recompute))
                    elif isinstance(layer, Head):
                        part = vocabulary_shard_of_rank(
                            vocabulary_shard(model, self.tp.size, self.tp.rank).start, self.tp
                        )
                        last, self.loss_fn = head_and_loss(layer, settings.head_pieces, part, self.tp)
                        functions.append(last)
                    else:
                        functions.append(layer)
            for parameter in self.parameters():
                parameter.ds_pipe_replicated = False

    # DeepSpeed only counts the list; each rank builds its own layers above, on its device, and no others.
    topology = PipeModelDataParallelTopology(num_pp=layout.pp, num_mp=layout.tp, num_dp=layout.dp)
    return StageModule(layers=[*layer_builders(model)], topology=topology)


def _tensor_parallel(model: ModelConfig, layout: Layout, group: Any) -> TensorParallel:
    """This rank's part in tensor parallelism, with the groups of ranks that share key/value heads."""
    rank = dist.get_rank()
    sharing = {layout.tp: group}
    copies = kv_copies(model, layout.tp)
    if 1 < copies < layout.tp:
        for first in range(0, layout.world_size, copies):  # every rank makes every group, in one order
            neighbours = dist.new_group(list(range(first, first + copies)))
            if first <= rank < first + copies:
                sharing[copies] = neighbours
    return TensorParallel(group, layout.tp_rank(rank), layout.tp, layout.sequence_parallel, sharing)


def _device() -> torch.device:
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def _deepspeed_config(layout: Layout, settings: EngineSettings) -> dict[str, Any]:
    return {
        "train_batch_size": settings.micro_batch * settings.accumulation * layout.dp,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's prints and log lines, dozens per rank at start, off the terminal; errors pass."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
