"""The use of DeepSpeed: its process group, and its pipeline engine by subclassing.

Its launcher starts the processes. Its engine checks the batch, holds the module and frames a step; the step itself
(passes, messages, reduction, optimizer, loss over all ranks) is ours. `tests/parallel/test_deepspeed.py` names every
internal that this file relies on, so that an upgrade fails there. Importing it imports DeepSpeed, which takes seconds.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from model.batch import Batch
from parallel.environment import name_accelerator, prepare_gpu_environment, quiet, raise_file_limit, timeout
from parallel.groups import Ranks
from parallel.rendezvous import Rendezvous

name_accelerator(os.environ)
with quiet():
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.module import PipelineModule
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
    from deepspeed.utils.timer import NoopTimer

# On the CPU DeepSpeed would compile a shared-memory collective for 100 s, which leaks /dev/shm for good. Asked which of
# its operators could be compiled here, it would call the compiler, whose commands end in the log.
deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}

_RENAMED = ".*is deprecated. Please use"
"""PyTorch warns so once per collective and process; the new names are not in every version that is supported."""


def start_process_group(rendezvous: Rendezvous | None = None) -> torch.device:
    """Join the processes that the launcher started (RANK, WORLD_SIZE, MASTER_ADDR ... in the environment).

    Args:
        rendezvous: where they find each other, once all of them are there; None for PyTorch's own, by the environment.

    Returns:
        This rank's device: its GPU by LOCAL_RANK, or the CPU.

    Raises:
        RuntimeError: this system lets a process open too few files for so many processes, or some did not come.
    """
    warnings.filterwarnings("ignore", message=_RENAMED, category=FutureWarning)
    raise_file_limit(int(os.environ.get("WORLD_SIZE", "1")))
    with quiet():
        on_gpu = get_accelerator().device_name() == "cuda"
        if on_gpu:
            prepare_gpu_environment(os.environ)
            get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if rendezvous:  # who finds something wrong on its way here says so there
            rendezvous.wait_for_all()
        deepspeed.init_distributed(
            "nccl" if on_gpu else "gloo",
            auto_mpi_discovery=False,
            timeout=timeout(),
            init_method=rendezvous.init_method() if rendezvous else None,
        )
        return current_device()


def current_device() -> torch.device:
    """Return the current device of DeepSpeed's accelerator."""
    return torch.device(get_accelerator().current_device_name())


class _MetaAccelerator(CPU_Accelerator):
    """The meta device, as DeepSpeed asks for the device that it computes on."""

    def device_name(self, device_index: int | None = None) -> str:
        return "meta"

    current_device_name = current_device = device_name

    def device(self, device_index: int | None = None) -> Any:
        return nullcontext()


@contextmanager
def on_meta(backend: str) -> Iterator[None]:
    """Have DeepSpeed compute on the meta device inside this context, and use the process group that there is.

    Args:
        backend: the name of the backend of that group.
    """
    real = get_accelerator()
    set_accelerator(_MetaAccelerator())
    try:
        with quiet():
            deepspeed.init_distributed(backend, auto_mpi_discovery=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_RENAMED, category=FutureWarning)
            yield
    finally:
        deepspeed.comm.comm.cdb = None
        set_accelerator(real)


class RankGrid(PipelineParallelGrid):
    """The rank grid by DeepSpeed's names, over existing groups: its own grid would create each of them again.

    Args:
        ranks: this process and its groups.
    """

    def __init__(self, ranks: Ranks):
        layout = ranks.layout
        self._topo = PipeModelDataParallelTopology(num_pp=layout.pp, num_mp=layout.tp, num_dp=layout.dp)
        self.global_rank, self.world_size = ranks.rank, layout.world_size
        self.data_parallel_size, self.pipe_parallel_size = layout.dp, layout.pp
        self.model_parallel_size = self.slice_parallel_size = layout.tp
        self.stage_id, self.data_parallel_id = ranks.pp_rank, ranks.dp_rank
        # DeepSpeed's model group is one replica; only a count of parameters is summed over it, for a line of its log.
        self.ds_model_proc_group, self.ds_model_world_size = None, layout.pp * layout.tp
        self.ds_model_rank = ranks.pp_rank * layout.tp + ranks.tp_rank
        self.dp_proc_group, self.pp_proc_group, self.slice_proc_group = ranks.dp, ranks.pp, ranks.tp
        self.pp_group = list(ranks.pipeline)
        self.p2p_groups: list[list[int]] = []


class StageModule(PipelineModule):
    """A `PipelineModule` of layers that are already built; it partitions nothing, builds nothing and ties nothing.

    Args:
        layers: the layers of this rank.
        ranks: this process and its groups.
    """

    def __init__(self, layers: Sequence[nn.Module], ranks: Ranks):
        nn.Module.__init__(self)
        self.layers = nn.ModuleList(layers)
        self._grid = RankGrid(ranks)
        self._topo, self.stage_id, self.num_stages = self._grid._topo, ranks.pp_rank, ranks.layout.pp
        self._local_start, self._local_stop = 0, len(layers)
        self.tied_comms: dict[str, Any] = {}
        self.activation_checkpoint_interval, self.activation_checkpoint_func = 0, None
        self.dynamic_shape = False


class StageEngine(PipelineEngine):
    """A `PipelineEngine` that runs our own step and evaluation, constructed as `deepspeed.initialize` constructs one.

    Args:
        layers: the layers of this rank, in fp32 on their device.
        ranks: this process and its groups.
        micro_batch: the number of sequences of a micro-batch.
        accumulation: the number of micro-batches of a step.
        train: the function that `train_batch` calls with the micro-batches of a step, and whose result it returns.
        evaluate: the function that `eval_batch` calls with micro-batches and their number, and whose result it returns.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        ranks: Ranks,
        micro_batch: int,
        accumulation: int,
        train: Callable[[Iterator[Batch]], Any],
        evaluate: Callable[[Iterator[Batch], int], Any],
    ):
        self._train, self._evaluate, self._outcome = train, evaluate, None
        settings = {
            "train_batch_size": micro_batch * accumulation * ranks.layout.dp,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "steps_per_print": None,
            "wall_clock_breakdown": False,
        }
        module = StageModule(layers, ranks)
        grid = module.mpu()
        super().__init__(
            args=None, model=module, mpu=grid, config=settings, config_class=DeepSpeedConfig(settings, grid)
        )
        self.timers = NoopTimer()  # DeepSpeed's timers would keep two events of every step for ever
        self.fwd_outputs: list[Any] = []  # PipelineEngine creates it in the schedule that is replaced here

    def _broadcast_model(self) -> None:
        """Send nothing: weights are initialised by name, or read, alike on all replicas."""

    def _train_schedule(self) -> Callable[[Iterator[Batch]], Any]:
        return self._train

    def _inference_schedule(self, micro_batches: int) -> Callable[[Iterator[Batch]], Any]:
        return lambda batches: self._evaluate(batches, micro_batches)

    def _exec_schedule(self, pipe_schedule: Callable[[Iterator[Batch]], Any]) -> None:
        self._outcome = pipe_schedule(self.data_iterator)

    # Every rank reads the data and has the loss of all ranks: none broadcasts it, and no link is opened for that.
    def is_first_stage(self) -> bool:
        """Return whether this rank reads micro-batches."""
        return True

    def is_last_stage(self) -> bool:
        """Return whether this rank has the loss."""
        return True

    def _aggregate_total_loss(self) -> Any:
        return self._outcome

    def _reduce_outputs(self, outputs: Any, **how: Any) -> Any:
        return self._outcome

    def _bcast_pipe_scalar(self, data: Any, **how: Any) -> Any:
        return data
