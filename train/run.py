"""A run is opened on every rank: processes join, stages are built, state is restored, data, log and saver are made."""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from conf.ramp import rungs
from conf.ranges import below, ranges_of
from conf.schema import Config, to_jsonable
from model.batch import Batch
from model.kernels import which_and_why
from parallel.costs import layer_costs
from parallel.engine import Engine, Limits, StepResult, build_engine
from parallel.environment import quiet
from parallel.heartbeat import Phase, heart
from parallel.layout import Layout
from parallel.processes import use_cpus_fairly
from parallel.rendezvous import Rendezvous
from parallel.stages import Stage, split_for
from parallel.state import OptimizerState
from train import started, timeline
from train.agreement import checkpoint_group, control_group, from_rank_0, max_over_ranks, on_rank_0
from train.checkpoint import history, resume
from train.checkpoint.folder import CHECKPOINTS
from train.checkpoint.manifest import Manifest
from train.checkpoint.resume import Start
from train.checkpoint.saver import Saver
from train.data.batches import ahead, train_micro_batches
from train.data.mixed_order import MixedOrder, TrainSamples
from train.evaluate.evaluator import Evaluator
from train.events import tell_of_restart
from train.header import announce
from train.health import all_finite
from train.job import computes_in_bf16, engine_settings
from train.learning_rate import rate_share
from train.length import Consumed, Length, length_of
from train.metrics import peak_flops
from train.optimizer import adamw
from train.patient_file import patient_logs
from train.predicted import Expected
from train.preflight import PreparedRun
from train.records import diverged_before
from train.report import RunConstants, StepReport
from train.spikes import Kind, SkippedStep, SpikeWindow
from train.stopping import StopSignals
from train.stragglers import Stragglers
from train.tracking import Tracker
from train.version import code_version

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run that is open on this rank.

    Attributes:
        prepared: from `train.preflight`.
        signals: whether this rank has been told to stop.
        length: in steps and tokens.
        begun: what was trained on before the settings of this run held.
        run_dir: the run folder, the same on every rank.
        device, rank: of this process.
        group: of all ranks, over the CPU.
        patient_group: the same, for what takes longer; saves use it, and nothing else while one is under way.
        engine: this rank's stages and optimizer.
        order: of the samples, over the sources and stages of the data.
        samples: where those lie.
        passed_steps: steps to pass over.
        window: of losses and norms, by which the next step is judged.
        stragglers: which ranks are slow.
        batches: micro-batches to train on, without end.
        evaluator: of held-out documents and tasks.
        steps_before: optimizer steps that a checkpoint brought along.
        resumed: whether there was such a checkpoint.
        constants: by which the figures of a step are computed.
        expected: what a plan predicts of its steps; nothing but on rank 0.
        saver: of checkpoints.
        tracker: of rank 0, None elsewhere.
    """

    prepared: PreparedRun
    signals: StopSignals
    length: Length
    begun: Consumed
    run_dir: Path
    device: torch.device
    rank: int
    group: dist.ProcessGroup
    patient_group: dist.ProcessGroup
    engine: Engine
    order: MixedOrder
    samples: TrainSamples
    passed_steps: frozenset[int]
    window: SpikeWindow
    stragglers: Stragglers
    batches: Iterator[Batch]
    evaluator: Evaluator
    steps_before: int
    resumed: bool
    constants: RunConstants
    expected: Expected
    saver: Saver
    tracker: Tracker | None

    @property
    def config(self) -> Config:
        """All settings."""
        return self.prepared.config

    @property
    def layout(self) -> Layout:
        """The rank grid."""
        return self.prepared.layout

    def rate(self, step: int) -> float:
        """Compute the learning rate of a step."""
        return self.config.optimizer.lr * rate_share(step, self.length, self.config.schedule)

    def micro_batches(self, step: int) -> int:
        """Compute the gradient accumulation of a step: micro-batches of one rank."""
        return self.length.at(step).global_batch // (self.config.train.micro_batch * self.layout.dp)

    def source_tokens(self, step: int) -> dict[str, int]:
        """Count the tokens of each source that are trained on in the first so many steps."""
        return self.order.source_tokens(self.length.samples_after(step))

    def history(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint of a step says of what was trained on."""
        now = self.order.consumed(self.length, step)
        return history.as_json(self.begun, now, self.prepared.data.fingerprints, self.window.as_json())

    def kind(self, step: int) -> Kind:
        """Return what the losses of a step are comparable by: batch, length and mixture."""
        size = self.length.at(step)
        return [size.global_batch, size.seq_len, self.order.shares(size.samples_before)]

    def ends_of_batch(self, step: int) -> tuple[int, int]:
        """Return the places of the first and the last sample of a step's batch in the order of the run."""
        size = self.length.at(step)
        first, last = self.order.places([size.samples_before, size.samples_before + size.global_batch - 1]).tolist()
        return first, last

    def skipped(self, step: int, result: StepResult, limits: Limits) -> SkippedStep | None:
        """Describe a step whose update was skipped, with the samples of its batch; None for any other."""
        if not result.skipped:
            return None
        size = self.length.at(step)
        samples = np.arange(size.samples_before, size.samples_before + size.global_batch)
        return SkippedStep.of(step, result, limits, self.order.places(samples), *self.samples.named(samples))

    def slow_ranks(self, report: StepReport) -> dict[str, Any]:
        """Say which ranks are slow, where a report tells; what of it stands in the record of the step."""
        if not report.pass_seconds or self.tracker is None:
            return {}
        slow = self.stragglers.slow(report.pass_seconds)
        if line := self.stragglers.said(slow):
            self.say(line, logging.WARNING)
        return {"slow_ranks": {str(one.rank): one.ratio for one in slow}} if slow else {}

    def weights_are_finite(self) -> bool:
        """Tell whether the master weights of all ranks are finite. All ranks call it together."""
        own = all_finite(bucket.master.detach() for bucket in self.engine.zero.buckets)
        return not any(max_over_ranks([not own], self.group))

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Write a line to the log; of ranks other than 0, warnings reach the terminal."""
        _sayer(self.tracker)(text, level)


def _sayer(tracker: Tracker | None) -> Callable[[str, int], object]:
    return tracker.say if tracker else lambda text, level: log.log(level, "%s", text)


def open_run(prepared: PreparedRun, signals: StopSignals, rendezvous: Rendezvous) -> Run:
    """Open a run that has steps left; every rank calls it.

    Raises:
        BadInput: on every rank: the checkpoint to go on from is damaged or does not fit.
    """
    from parallel.deepspeed_engine import start_process_group  # DeepSpeed takes seconds to import

    config, layout = prepared.config, prepared.layout
    if config.train.deterministic:
        be_deterministic()
    device = start_process_group(rendezvous)
    rank = dist.get_rank()
    logs = patient_logs()
    use_cpus_fairly(device)
    group = control_group()
    start = prepared.start
    run_dir = from_rank_0(prepared.run_dir.absolute(), group)  # a relative path goes on from where rank 0 was started

    dtype = compute_dtype(config, device)
    stages = _stages(config, device, dtype)
    engine = _engine(config, layout, stages, dtype)
    state = OptimizerState(engine.zero)
    patient = checkpoint_group()
    heart.at(Phase.LOAD)
    past = _restore(prepared, start, state, patient)
    steps_before = past.step if past else 0

    begun = history.begun(config, past, prepared.data.fingerprints)
    length = length_of(config, begun)
    order, held_out = MixedOrder.of(config, length, begun), prepared.data.held_out(config)
    samples = TrainSamples(order, prepared.data.by_name, config.train.seed)
    passed_steps = frozenset(chain(*below(ranges_of(config.train.skip_steps), length.steps + 1)))
    batches = train_micro_batches(
        samples, length.at, first_step=steps_before + 1, passed_over=passed_steps, **_reading(prepared, rank)
    )
    facts = _facts(prepared, stages, device, dtype)
    saver = _saver(prepared, run_dir, start, state, facts, patient)
    tracker, expected = None, Expected.nothing(config, layout)
    if rank == 0:
        expected = Expected.of(config, layout, dtype is torch.bfloat16, device)
        diverged = diverged_before(run_dir)
        resumed = steps_before if start.own else None
        tracker = Tracker(
            config, run_dir, length.steps, facts, resumed, logs, saver.want, price_per_hour=expected.price_per_hour
        )
        whole = {"steps": length.steps, "tokens": length.tokens_after(length.steps), "resumed": resumed}
        started.complete(run_dir, **whole, **facts, world_size=layout.world_size, code=code_version())
        tell_of_restart(tracker, run_dir, os.environ)
        announce(prepared, stages, facts, past, begun, length, order, held_out)
        log.info("%s", expected.announced(length))
        if past and diverged:
            log.warning("the run diverged (%s); step %s is its last checkpoint that is finite", diverged, past.step)
    # While a save is under way the patient group is its own.
    asking = checkpoint_group() if config.eval.tasks else group
    evaluator = Evaluator(prepared, engine, _replica(prepared, rank), asking, length.steps, _sayer(tracker))
    if config.eval.tasks:
        max_over_ranks([0], patient)  # rank 0 may read tasks for longer than a step waits for it
    return Run(
        prepared=prepared,
        signals=signals,
        length=length,
        begun=begun,
        run_dir=run_dir,
        device=device,
        rank=rank,
        group=group,
        patient_group=patient,
        engine=engine,
        order=order,
        samples=samples,
        passed_steps=passed_steps,
        window=SpikeWindow(config.train.spike_sigmas, history.window(past)),
        stragglers=Stragglers(
            layout,
            rank,
            config.train.straggler_percent,
            config.train.straggler_steps,
            on_rank_0(socket.gethostname(), group),
        ),
        batches=ahead(batches, pinned=device.type == "cuda"),
        evaluator=evaluator,
        steps_before=steps_before,
        resumed=past is not None,
        expected=expected,
        constants=_constants(config, layout, stages, device, length),
        saver=saver,
        tracker=tracker,
    )


def leave() -> None:
    """Leave the process group."""
    with quiet():
        dist.destroy_process_group()


def be_deterministic() -> None:
    """Make PyTorch use deterministic algorithms alone; call it before CUDA is used."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is deterministic with a workspace of fixed size alone
    torch.use_deterministic_algorithms(True)
    # PyTorch would also fill what `torch.empty` makes, to find out who reads it unwritten; that is a debugging aid.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Choose the dtype that the stages compute in: `train.precision`, which by default goes by the device."""
    return torch.bfloat16 if computes_in_bf16(config, on_gpus=device.type == "cuda") else torch.float32


def _stages(config: Config, device: torch.device, dtype: torch.dtype) -> list[Stage]:
    """Cut the model into stages of even cost."""
    train = config.train
    size = dict(seq_len=train.seq_len, micro_batch=train.micro_batch)
    costs = layer_costs(config.model, config.parallel.balance, device=device, dtype=dtype, **size)
    return split_for(costs, config.parallel.placement)


def _engine(config: Config, layout: Layout, stages: list[Stage], dtype: torch.dtype) -> Engine:
    batch = rungs(config.train.global_batch)[0].global_batch
    settings = engine_settings(config, layout, bf16=dtype is torch.bfloat16, global_batch=batch)
    make_optimizer = partial(adamw, settings=config.optimizer)
    return build_engine(config.model, layout, stages, settings, make_optimizer=make_optimizer)


def _restore(prepared: PreparedRun, start: Start, state: OptimizerState, group: dist.ProcessGroup) -> Manifest | None:
    """Load a checkpoint of any layout, or else the weights to begin with; return the checkpoint's manifest."""
    past = resume.load_newest_sound(prepared.config, start, state, group)
    if prepared.source and not past:
        resume.load_weights(state, prepared.source.weights, group)
    return past


def _reading(prepared: PreparedRun, rank: int) -> dict[str, Any]:
    """Say which samples this rank reads, those of its replica whatever its stage, and what it does at borders."""
    borders = {"eos_id": prepared.data.eos_id, "document_mask": bool(prepared.config.data.document_mask)}
    return {**_replica(prepared, rank), **borders}


def _replica(prepared: PreparedRun, rank: int) -> dict[str, int]:
    """Say how many samples this rank reads at a time, and for which of the replicas."""
    layout = prepared.layout
    return {"micro_batch": prepared.config.train.micro_batch, "dp_rank": layout.replica(rank), "dp_size": layout.dp}


def _facts(prepared: PreparedRun, stages: list[Stage], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Collect the facts that identify a run besides its settings."""
    model, seq_len, data = prepared.config.model, prepared.config.train.seq_len, prepared.data
    return {
        "layout": {**asdict(prepared.layout), "stages": [asdict(stage) for stage in stages]},
        "parameters": model.num_params,
        "flops_per_token": model.flops_per_token(seq_len),
        "flops_per_token_whole_attention": model.flops_per_token_whole_attention(seq_len),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": "bf16" if dtype is torch.bfloat16 else "fp32",
        "kernels": which_and_why(model, device, dtype, bool(prepared.config.data.document_mask)),
        "data": {"train_tokens": data.num_train_tokens, "val_tokens": data.num_val_tokens},
    }


def _constants(
    config: Config, layout: Layout, stages: list[Stage], device: torch.device, length: Length
) -> RunConstants:
    parallel, peak = config.parallel, peak_flops(device)
    shares = [stage.cost_share for stage in stages]
    batches = {span.first.global_batch for span in length.planned()} if layout.pp > 1 else set()
    unit = config.train.micro_batch * layout.dp
    return RunConstants(
        model=config.model,
        peak_flops=peak * layout.world_size if peak else None,
        bubble_expected={
            batch: timeline.expected(parallel.schedule, parallel.placement, batch // unit, shares).bubble
            for batch in batches
        },
        varies=length.varies,
    )


def _saver(
    prepared: PreparedRun,
    run_dir: Path,
    start: Start,
    state: OptimizerState,
    facts: dict[str, Any],
    group: dist.ProcessGroup,
) -> Saver:
    config, data = prepared.config, prepared.data
    return Saver(
        state,
        run_dir / CHECKPOINTS,
        config.checkpoint,
        facts={
            "data": data.fingerprint,
            "config": to_jsonable(asdict(config)),
            "layout": facts["layout"],
            "code": code_version() if dist.get_rank() == 0 else "",
            "origin": start.origin,
        },
        tokenizer=data.tokenizer_path,
        group=group,
    )
