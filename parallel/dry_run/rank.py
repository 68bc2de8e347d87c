"""A dry run of one rank: whole steps of the engine that trains, on meta tensors, with every message recorded."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from unittest import mock

import torch
from torch.optim import adam

from model.batch import Batch
from model.documents import Documents
from model.layers import rotary_tables
from model.stand_ins import standing_in
from parallel.dry_run.process_group import DryGroup, one_of_many
from parallel.dry_run.record import Awaited, Call, Record, Recorder, Section
from parallel.dry_run.stand_ins import stand_ins_for
from parallel.dry_run.storages import STATE, Held, Kind
from parallel.engine import Engine, build_engine
from parallel.groups import DRY, Ranks
from parallel.plan.job import Job
from parallel.plan.operations import Attention, GroupKind, Message, Operation, Product, Wait
from parallel.schedules import TABLE, Action, Pass, source_of
from parallel.zero import MakeOptimizer

META = torch.device("meta")


@dataclass(frozen=True)
class Exchange:
    """A message that a rank takes part in.

    Attributes:
        operation: all_reduce, all_gather, reduce_scatter, broadcast, barrier, send or receive.
        kind: the ranks that it goes between.
        group: the global ranks of the group, in order; of a message between two ranks these, sender first.
        num_bytes: of the whole tensor: what an all-gather ends with and a reduce-scatter begins with.
        dtype: of its values, as PyTorch names it.
        how: SUM, MAX and the like of a reduction; else empty.
        of: of a message between two ranks, the pass whose result it is.
        section: the index of the section of `RankRun.sections` in which it begins.
    """

    operation: str
    kind: GroupKind
    group: Sequence[int]
    num_bytes: int
    dtype: str
    how: str
    of: Action | None
    section: int


@dataclass(frozen=True)
class RankSection:
    """What a rank does and holds in a pass, or before or after all of them.

    Attributes:
        name: ``"B stage 0 micro-batch 4"``, ``"before the passes"`` or ``"after the passes"``.
        action: the pass; None before and after them.
        operations: in order. `Message.index` counts the messages that are not awaited at once; a `Wait` that comes
            before its message in a step is for that of the step before.
        held: the bytes that it holds.
    """

    name: str
    action: Action | None
    operations: Sequence[Operation]
    held: Held

    @cached_property
    def flops(self) -> float:
        """The FLOPs of its products and of attention, whose masked half is not counted."""
        return sum(one.flops for one in self.operations if isinstance(one, (Product, Attention)))


@dataclass(frozen=True)
class RankRun:
    """The second of two steps of a rank: the first one makes what is kept, the moments among it.

    Attributes:
        job: of which it is a rank.
        rank: its global rank.
        micro_batches: the number of micro-batches of the step that was run, which may be fewer than the job's.
        sections: the passes in order, between what comes before and after them.
        exchanges: all messages of the step, in order.
        kept: the bytes of each micro-batch that are held until the step ends: its token ids and labels, what says where
            its documents are, and on the rank of the last stage its loss.
        state: the bytes of weights, gradients and optimizer between two steps, by kind.
        building: the most bytes while the engine was built.
        reads: the values that the host asked the device for, in the step.
        seconds: that the dry run took.
    """

    job: Job
    rank: int
    micro_batches: int
    sections: Sequence[RankSection]
    exchanges: Sequence[Exchange]
    kept: int
    state: Mapping[Kind, int]
    building: int
    reads: int
    seconds: float

    @cached_property
    def fullest(self) -> RankSection:
        """The section in which the most bytes were allocated, the first one of several."""
        return max(self.sections, key=lambda section: section.held.peak)

    @property
    def peak(self) -> int:
        """The most bytes that are allocated at any time of a whole step of the job."""
        return sum(self.peak_by_kind.values())

    @property
    def peak_by_kind(self) -> Mapping[Kind, int]:
        """Those bytes by kind: what was seen, and what the micro-batches that were not run would leave, which may not
        all be there at the time of the peak yet: at most so much is counted too much."""
        found = self.fullest.held.by_kind
        return {**found, Kind.activations: found[Kind.activations] + self.left_out}

    @property
    def left_out(self) -> int:
        """The bytes that the micro-batches that were not run would leave until the end of the step."""
        return max(self.job.settings.accumulation - self.micro_batches, 0) * self.kept

    @property
    def peak_at(self) -> str:
        """The name of the section in which they were."""
        return self.fullest.name

    @property
    def state_bytes(self) -> int:
        """The bytes of weights, gradients and optimizer."""
        return sum(self.state.values())

    @property
    def flops(self) -> float:
        """The FLOPs of a whole step of the job, recomputation among them: micro-batches are all alike."""
        done = sum(section.flops for section in self.sections)
        return done / self.micro_batches * self.job.settings.accumulation


def enough_micro_batches(job: Job) -> int:
    """Return how many micro-batches show all that a rank of a job ever holds.

    After twice as many as the pipeline has ranks, and three times where these are two, every schedule repeats itself:
    in a longer step it holds no more but what is left of each micro-batch until the end (`RankRun.kept`).
    """
    return min(job.settings.accumulation, 6 if job.layout.pp == 2 else 2 * job.layout.pp)


def run(
    job: Job,
    rank: int,
    *,
    make_optimizer: MakeOptimizer | None = None,
    micro_batches: int | None = None,
    document: int | None = None,
) -> RankRun:
    """Run two steps of one rank as it would run on a GPU, and return what it did and held in the second.

    The engine, the pipeline, the optimizer, the tensor-parallel layers and DeepSpeed's engine are those that train.
    What is stood in for are kernels (compiled formulas and flash attention hold what theirs hold), the device (meta
    tensors: no values), the other ranks (a process group that records what it is told, and stands for NCCL), and the
    initial weights. It takes seconds, and as much memory for any size of model. A process is one rank at a time.

    Args:
        job: what is run; `parallel.layout.problems` and `parallel.schedules.batch_problems` find none in it.
        rank: the global rank.
        make_optimizer: as for `parallel.engine.build_engine`; None for PyTorch's fused AdamW.
        micro_batches: the number of micro-batches of the step; None for `enough_micro_batches`.
        document: the tokens of each document, at whose borders attention stops; None for whole sequences.

    Raises:
        RuntimeError: this process is in a process group already.
    """
    began = time.perf_counter()
    if torch.distributed.is_initialized():
        raise RuntimeError("a dry run needs a process of its own: this one is in a process group already")
    layout, settings = job.layout, job.settings
    record = Record("meta")
    rotary_tables.cache_clear()  # so that each rank makes its own
    from parallel.deepspeed_engine import on_meta

    with (
        one_of_many(rank, layout.world_size, record),
        on_meta(DRY),
        standing_in(stand_ins_for(record)),
        mock.patch.object(adam, "_device_dtype_check_for_fused", lambda *how, **more: None),
        Recorder(record),
    ):
        engine = build_engine(
            *(job.model, layout, job.stages, settings, make_optimizer or _adamw, META),
            value=lambda name, shape: torch.empty(shape, device=META),
        )
        engine.pipeline.around = record.around
        building = record.storages.peak
        _label_buckets(engine, record)
        batches = _batches(settings.micro_batch, settings.seq_len, document)
        first = _step(engine, record, batches, _fewest_micro_batches(job))
        record.storages.label(_moments(engine), Kind.optimizer)
        number = micro_batches or enough_micro_batches(job)
        second = _step(engine, record, batches, number)
        held = record.storages.held()
        sections, exchanges = _told(job, engine.ranks, record, first, second)
        rotary_tables.cache_clear()
    return RankRun(
        job,
        rank,
        number,
        sections,
        exchanges,
        record.storages.kept() // number,
        {kind: held[kind] for kind in STATE},
        building,
        record.reads,
        time.perf_counter() - began,
    )


def _adamw(matrices: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([*matrices, *vectors], fused=True)


def _fewest_micro_batches(job: Job) -> int:
    """Return the fewest micro-batches that the schedule runs."""
    row, pp = TABLE[job.settings.schedule.name], job.layout.pp
    return max(row.least_per_rank * pp, pp if row.multiple_of_ranks else 1)


def _batches(micro_batch: int, seq_len: int, document: int | None) -> Iterator[Batch]:
    """Yield micro-batches without end."""
    ids = partial(torch.empty, (micro_batch, seq_len), dtype=torch.int64, device=META)
    lengths = [min(document, seq_len - at) for at in range(0, seq_len, document)] * micro_batch if document else []
    borders = partial(torch.empty, len(lengths) + 1, dtype=torch.int32, device=META)
    while True:  # nothing is kept here of what has been yielded
        yield Batch(ids(), ids(), Documents(ids(), borders(), tuple(lengths)) if document else None)


def _label_buckets(engine: Engine, record: Record) -> None:
    for bucket in engine.zero.buckets:
        record.storages.label([bucket.weights], Kind.weights)
        record.storages.label([bucket.gradients], Kind.gradients)
        record.storages.label([bucket.master.data], Kind.optimizer)


def _moments(engine: Engine) -> list[torch.Tensor]:
    states = engine.zero.adam.state.values()
    return [one for state in states for one in state.values() if isinstance(one, torch.Tensor)]


def _step(engine: Engine, record: Record, batches: Iterator[Batch], micro_batches: int) -> list[Call]:
    """Run a step and return the calls of process groups in it."""
    record.restart()
    reduce = engine.zero.reduce

    def ended() -> torch.Tensor:
        record.end()
        return reduce()

    with mock.patch.object(engine.zero, "reduce", ended):
        engine.step(batches, 1e-4, micro_batches)
    return record.calls


# ---- the record as the plan has it ----


def _told(
    job: Job, ranks: Ranks, record: Record, first: Sequence[Call], second: Sequence[Call]
) -> tuple[list[RankSection], list[Exchange]]:
    """Return the sections of the last step and its messages.

    Args:
        job, ranks: whose step it was.
        record: of the step.
        first, second: the calls of the step before and of this one; both end with the same ones.
    """
    kinds = _kinds(ranks)
    waited_in: dict[int, Action | None] = {}
    for section in record.sections:
        for one in section.done:
            if isinstance(one, Awaited) and one.step == record.step:
                waited_in.setdefault(one.number, section.action)
    sections, exchanges = [], []
    for index, (section, held) in enumerate(zip(record.sections, record.storages.sections(), strict=True)):
        operations = _operations(section.done, kinds, record.step, len(second) - len(first))
        sections.append(RankSection(_name(section, index), section.action, operations, held))
        for one in section.done:
            if isinstance(one, Call):
                exchanges.append(_exchange(job, one, kinds, section.action, waited_in.get(one.number), index))
    return sections, exchanges


def _kinds(ranks: Ranks) -> dict[Any, GroupKind]:
    kinds = {group: GroupKind.pp for group in (ranks.pp, *ranks.links.values())}
    kinds |= {group: GroupKind.sharing for group in ranks.sharing.values()}
    return kinds | {ranks.tp: GroupKind.tp, ranks.dp: GroupKind.dp}


def _name(section: Section, index: int) -> str:
    if section.action is None:
        return "after the passes" if index else "before the passes"
    return section.action.said


def _operations(
    done: Sequence[Operation | Call | Awaited], kinds: Mapping[Any, GroupKind], step: int, longer: int
) -> list[Operation]:
    """Return what is done in a section as operations of the plan.

    Args:
        done: what has been recorded.
        kinds: the kind of each group; the world is in none.
        step: the number of this step.
        longer: the number of calls that this step has more than the step before.
    """
    found: list[Operation] = []
    skipped = False
    for one, then in zip(done, [*done[1:], None], strict=False):
        if skipped:
            skipped = False
        elif isinstance(one, Call):
            skipped = isinstance(then, Awaited) and then == Awaited(step, one.number)
            index = -1 if skipped else one.number
            kind = kinds.get(one.group, GroupKind.world)
            found.append(Message(one.operation, kind, one.group.size(), one.num_bytes, index))
        elif isinstance(one, Awaited):
            found.append(Wait(one.number if one.step == step else one.number + longer))
        else:
            found.append(one)
    return found


def _exchange(
    job: Job,
    call: Call,
    kinds: Mapping[Any, GroupKind],
    action: Action | None,
    waited_in: Action | None,
    section: int,
) -> Exchange:
    group: DryGroup = call.group
    ranks: Sequence[int] = group.ranks
    of = None
    if call.operation in ("send", "receive"):
        own, other = ranks[group.rank()], ranks[call.peer]
        ranks = (own, other) if call.operation == "send" else (other, own)
        of = action if call.operation == "send" else source_of(waited_in, job.placement) if waited_in else None
        if call.operation == "send" and action is not None:
            assert action.what is not Pass.W, "weight gradients go to no other rank"
    kind = kinds.get(call.group, GroupKind.world)
    return Exchange(call.operation, kind, ranks, call.num_bytes, call.dtype, call.how, of, section)
