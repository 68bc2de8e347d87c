"""A stage of the model on DeepSpeed's pipeline engine: 1F1B, ZeRO-1 over the replicas, fp32 gradient accumulation.

DeepSpeed runs the schedule, the reductions, clipping and the optimizer step. Ours are which layers a stage holds, that
each is built by itself and starts from (seed, full name), and the settings below that DeepSpeed gets wrong by default.
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from model.config import ModelConfig
from model.init import initialise
from model.loss import cross_entropy
from model.transformer import layer_builders
from parallel.layout import Layout
from parallel.stages import Stage

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

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
    """

    micro_batch: int
    accumulation: int
    clip: float | None
    bf16: bool
    seed: int


def start_process_group(timeout: timedelta = timedelta(minutes=30)) -> torch.device:
    """Join the processes that the launcher started (RANK, WORLD_SIZE, MASTER_ADDR ... in the environment).

    Returns:
        This rank's device: its GPU by LOCAL_RANK, or the CPU.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # unasked, DeepSpeed warns that it found no better one
    with quiet():
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        # On the CPU DeepSpeed would compile a shared-memory collective for 100 s, which leaks /dev/shm for good.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        on_gpu = get_accelerator().device_name() == "cuda"
        if on_gpu:
            get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
        deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, timeout=timeout)
        return torch.device(get_accelerator().current_device_name())


def build_engine(
    model: ModelConfig,
    layout: Layout,
    stages: Sequence[Stage],
    settings: EngineSettings,
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
) -> "PipelineEngine":
    """This rank's stage, initialised, on its device, with its optimizer. All ranks call it together.

    Args:
        model: the whole model's shape.
        layout: the rank grid; `start_process_group` has been called on layout.world_size processes.
        stages: of all ranks, as `parallel.stages.split` made them.
        settings: batch, precision, clipping, seed.
        make_optimizer: from the stage's parameters to its optimizer; ZeRO-1 shards its state over the replicas.
    """
    with quiet():
        import deepspeed
        from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

        topology = PipeDataParallelTopology(num_pp=layout.pp, num_dp=layout.dp)
        module = _stage_module(model, stages, settings.seed, topology)
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=make_optimizer(module.parameters()), config=_deepspeed_config(layout, settings)
        )
    return engine


def named_parameters(engine: "PipelineEngine", model: ModelConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of this rank's stage by their full names, the same in every layout."""
    names = list(layer_builders(model))
    for name, parameter in engine.module.named_parameters():
        index, _, inner = name.partition(".")  # DeepSpeed names a layer by its index in the whole model
        yield f"{names[int(index)]}.{inner}", parameter


def _stage_module(model: ModelConfig, stages: Sequence[Stage], seed: int, topology: Any) -> nn.Module:
    from deepspeed.runtime.pipe.module import PipelineModule

    class StageModule(PipelineModule):
        """The layers of one stage, by the bounds that `parallel.stages` found and in DeepSpeed's terms."""

        def _partition_layers(self, method: str = "") -> None:
            self.parts = [stage.start for stage in stages] + [stages[-1].stop]
            own = stages[self.stage_id]
            self._set_bounds(start=own.start, stop=own.stop)

        def _build(self) -> None:
            builders = list(layer_builders(model).items())
            device = _device()
            for index in range(self._local_start, self._local_stop):
                name, build = builders[index]
                with torch.device("meta"):
                    layer = build()
                layer = layer.to_empty(device=device)
                initialise(layer, f"{name}.", seed, model.init_std)
                self.add_module(str(index), layer)
                self.fwd_map[str(index)] = len(self.forward_funcs)
                self.forward_funcs.append(layer)
            for parameter in self.parameters():
                parameter.ds_pipe_replicated = False

    # DeepSpeed only counts the list; each rank builds its own layers above, on its device, and no others.
    return StageModule(layers=[*layer_builders(model)], topology=topology, loss_fn=cross_entropy)


def _device() -> torch.device:
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def _deepspeed_config(layout: Layout, settings: EngineSettings) -> dict[str, Any]:
    return {
        "train_batch_size": settings.micro_batch * settings.accumulation * layout.dp,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_clipping": settings.clip or 0.0,
        # Stage 1 in fp32 too: stage 0 leaves replicated parameters of later stages out of the norm that clips.
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        # Without this, bf16 gradients are accumulated over micro-batches and reduced over replicas in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": settings.bf16, "immediate_grad_update": settings.bf16},
        # By default fp32 gradients would be averaged over the replicas in bf16.
        "communication_data_type": "fp32",
        # Both default to true, and would corrupt the tensors between stages once those are cut along the sequence.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
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
