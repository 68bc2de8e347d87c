"""Search for the layouts that train a model fastest on a cluster, among those that fit its GPUs.

Every choice of the space is tried: first whether it would run, then whether it fits by the formula of
`parallel/memory.py`, then its seconds. Of layouts that differ only in what they recompute, those that recompute more
than they need to fit are left out: recomputation is extra work and gains nothing but memory.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import product
from typing import Any

from model.config import ModelConfig
from parallel.engine import EngineSettings
from parallel.layer_memory import Step
from parallel.layout import Layout, Recompute
from parallel.memory import Memory, batch_bytes, stage_memory
from parallel.plan.cluster import Cluster
from parallel.plan.job import Job
from parallel.plan.predict import Prediction
from parallel.schedules import ONE_F_ONE_B, TABLE, Orders, Placement, Schedule, orders, placement_of
from parallel.simulation import held_messages

HEAD_PIECES = (1, 2, 4, 8, 16)
"""Numbers of pieces of the logits that are tried."""
VIRTUAL_STAGES = (1, 2, 3, 4, 6, 8)
"""Numbers of stages of a rank that are tried, where the schedule leaves a choice."""
MOST_TOKENS = 32_768
"""Micro-batches of more tokens are not tried, where one sequence has fewer."""


@dataclass(frozen=True)
class Choice:
    """What a plan chooses: a layout of the GPUs, and the settings that go with it.

    Attributes:
        pp, tp, dp: degrees of pipeline, tensor and data parallelism.
        schedule: the order of passes.
        virtual_stages: the number of stages of a rank.
        micro_batch: sequences of a micro-batch.
        recompute: the activations that blocks recompute.
        head_pieces: the number of pieces of the logits.
    """

    pp: int
    tp: int
    dp: int
    schedule: Schedule
    virtual_stages: int
    micro_batch: int
    recompute: Recompute = Recompute.none
    head_pieces: int = 1

    @property
    def placement(self) -> Placement:
        """The placement of the stages on the ranks of a pipeline."""
        return placement_of(self.schedule, self.pp, self.virtual_stages)


@dataclass(frozen=True)
class Space:
    """The values of each key to try, all of them with all others.

    Attributes:
        world_size: the number of GPUs, all of which are used.
        pp, tp, schedule, virtual_stages, micro_batch, recompute, head_pieces: the values of each key.
        dp: the one number of replicas to try; None for what pp and tp leave.
    """

    world_size: int
    pp: Sequence[int]
    tp: Sequence[int]
    schedule: Sequence[Schedule]
    virtual_stages: Sequence[int]
    micro_batch: Sequence[int]
    recompute: Sequence[Recompute]
    head_pieces: Sequence[int]
    dp: int | None = None

    def layouts(self) -> Iterator[Choice]:
        """Yield the choices without those of recomputation: the first value of `recompute` and `head_pieces`."""
        for tp, pp in product(self.tp, self.pp):
            if self.world_size % (pp * tp) or self.dp not in (None, self.world_size // (pp * tp)):
                continue
            for schedule, virtual, micro_batch in product(self.schedule, self.virtual_stages, self.micro_batch):
                if not _is_another(schedule, pp, virtual, self):
                    continue
                yield Choice(
                    pp, tp, self.world_size // (pp * tp), schedule, virtual, micro_batch,
                    self.recompute[0], self.head_pieces[0],
                )  # fmt: skip

    @property
    def recomputations(self) -> list[tuple[Recompute, int]]:
        """The choices of recomputation, by how much they recompute."""
        return list(product(sorted(self.recompute, key=list(Recompute).index), sorted(self.head_pieces)))


def _is_another(schedule: Schedule, pp: int, virtual: int, space: Space) -> bool:
    """Tell whether a schedule with these stages is a choice of its own, or repeats another of the space."""
    if pp == 1:
        alone = len(space.schedule) == 1 or schedule is ONE_F_ONE_B
        return alone and (virtual == 1 or len(space.virtual_stages) == 1)
    least, most = TABLE[schedule.name].virtual_stages
    return len(space.virtual_stages) == 1 or least <= virtual <= (most or virtual)


def space_for(cluster: Cluster, model: ModelConfig, seq_len: int, fixed: Mapping[str, Any]) -> Space:
    """Return the space that is searched for a model on a cluster.

    pp and tp are divisors of the number of GPUs and of a machine's; micro-batches are powers of two.

    Args:
        cluster: the machines.
        model: the whole model's shape.
        seq_len: the tokens of a sequence.
        fixed: the values of keys that are not searched, by the names of `Choice`.
    """
    world, batches = cluster.world_size, [1]
    while 2 * batches[-1] * seq_len <= MOST_TOKENS:
        batches.append(2 * batches[-1])
    tried: dict[str, Sequence[Any]] = {
        "pp": [pp for pp in range(1, min(world, model.n_layers) + 1) if world % pp == 0],
        "tp": [tp for tp in range(1, cluster.gpus_per_node + 1) if cluster.gpus_per_node % tp == 0],
        "schedule": list(Schedule),
        "virtual_stages": VIRTUAL_STAGES,
        "micro_batch": batches,
        "recompute": list(Recompute),
        "head_pieces": [pieces for pieces in HEAD_PIECES if pieces <= model.vocab_size],
    }
    known = {one.name for one in fields(Choice)}
    assert set(fixed) <= known, f"no keys of a choice: {set(fixed) - known}"
    kept = {key: [value] for key, value in fixed.items() if key != "dp"}
    return Space(world, dp=fixed.get("dp"), **{**tried, **kept})


@dataclass(frozen=True)
class Task:
    """What is planned: the model and the step, the same for every layout.

    Attributes:
        model: the whole model's shape.
        cluster: the machines.
        global_batch: sequences of a step.
        seq_len: tokens of a sequence.
        bf16: whether the stages compute in bf16, else in fp32.
        clip: the largest norm of the gradient, None for no clipping.
        sequence_parallel: whether norms and residuals are cut along the sequence where tp > 1.
        cut_at: of `Job`.
    """

    model: ModelConfig
    cluster: Cluster
    global_batch: int
    seq_len: int
    bf16: bool = True
    clip: float | None = 1.0
    sequence_parallel: bool = True
    cut_at: int | None = None

    def job(self, choice: Choice) -> Job:
        """Return the job that a choice makes of it."""
        settings = EngineSettings(
            micro_batch=choice.micro_batch,
            accumulation=self.global_batch // (choice.micro_batch * choice.dp),
            clip=self.clip,
            bf16=self.bf16,
            seed=1,
            seq_len=self.seq_len,
            recompute=choice.recompute,
            head_pieces=choice.head_pieces,
            schedule=choice.schedule,
            placement=choice.placement,
        )
        cut = choice.tp > 1 and self.sequence_parallel
        return Job(self.model, Layout(choice.dp, choice.pp, choice.tp, cut), settings, self.cut_at)


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, and what it takes.

    Attributes:
        choice: the layout and its settings.
        job: what it makes of the task.
        prediction: its seconds.
        rank: the rank of the pipeline that needs most memory.
        memory: of that rank, by the formula.
    """

    choice: Choice
    job: Job
    prediction: Prediction
    rank: int
    memory: Memory

    @property
    def seconds(self) -> float:
        """The seconds of a step."""
        return self.prediction.seconds


@dataclass
class Found:
    """The outcome of a search.

    Attributes:
        candidates: the layouts that fit and recompute no more than that takes, fastest first.
        tried: the number of choices that were looked at.
        refused: the number of choices that would not run, by the key that a problem names first.
        examples: a problem for each of these keys.
        too_large: the number of choices that do not fit.
        idle: the number of choices that fit, and recompute more than another one that fits.
        least: the choice that needs least memory, the rank that needs most of it, and its memory; None where all were
            refused.
    """

    candidates: list[Candidate] = field(default_factory=list)
    tried: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    too_large: int = 0
    idle: int = 0
    least: tuple[Choice, int, Memory] | None = None


def search(
    task: Task,
    space: Space,
    problems: Callable[[Choice], Sequence[str]],
    predict: Callable[[Job, Cluster], Prediction],
) -> Found:
    """Try every choice of a space.

    Args:
        task: what is planned.
        space: the values to try.
        problems: says why a choice would not run, one sentence each that begins with a key. It is asked once for the
            choices that differ in recomputation alone.
        predict: `parallel.plan.predict.predict`.

    Returns:
        The candidates by their predicted seconds; of equal ones, those that need less memory first.
    """
    found = Found()
    for choice, rank, memory in _fitting(task, space, problems, found):
        job = task.job(choice)
        found.candidates.append(Candidate(choice, job, predict(job, task.cluster), rank, memory))
    found.candidates.sort(key=lambda one: (one.seconds, one.memory.peak))
    return found


def first_fitting(task: Task, space: Space, problems: Callable[[Choice], Sequence[str]]) -> Choice | None:
    """Return the first choice of a space that would run and fits; None where there is none.

    Args:
        task, space, problems: as for `search`.
    """
    return next((choice for choice, _, _ in _fitting(task, space, problems, Found())), None)


def _fitting(
    task: Task, space: Space, problems: Callable[[Choice], Sequence[str]], found: Found
) -> Iterator[tuple[Choice, int, Memory]]:
    """Yield the choices that would run, fit, and recompute no more than that takes; the others are counted."""
    recomputations = space.recomputations
    for choice in space.layouts():
        found.tried += len(recomputations)
        if said := problems(choice):
            key = said[0].partition("=")[0]
            found.refused[key] += len(recomputations)
            found.examples.setdefault(key, said[0])
            continue
        yield from _least_recomputing(task, choice, recomputations, found)


def _least_recomputing(
    task: Task, choice: Choice, recomputations: Sequence[tuple[Recompute, int]], found: Found
) -> list[tuple[Choice, int, Memory]]:
    """Return the variants of a choice that fit, without those that recompute more than another one that fits.

    Args:
        task, choice: what is planned, and the layout.
        recomputations: the variants, by how much they recompute.
        found: in which the others are counted.
    """
    kept: list[tuple[Choice, int, Memory]] = []
    room = task.cluster.allocatable_bytes
    for at, (recompute, pieces) in enumerate(recomputations):
        if any(one.head_pieces <= pieces for one, _, _ in kept):  # it recomputes less, or as much
            found.idle += 1
            continue
        variant = replace(choice, recompute=recompute, head_pieces=pieces)
        rank, memory = fullest(task.job(variant), most=room)
        if found.least is None or memory.peak < found.least[2].peak:
            found.least = (variant, rank, memory)
        if memory.state > room:  # which recomputation leaves as it is
            found.too_large += len(recomputations) - at
            break
        if memory.peak > room:
            found.too_large += 1
        else:
            kept.append((variant, rank, memory))
    return kept


def fullest(job: Job, most: float = float("inf")) -> tuple[int, Memory]:
    """Return the rank of the pipeline that needs most memory, and its memory by the formula.

    Args:
        job: what is planned.
        most: bytes beyond which it does not matter which rank it is: the first that needs more is returned.
    """
    best: tuple[int, Memory] | None = None
    for rank in _by_expected_memory(job.placement):
        memory = rank_memory(job, rank)
        if best is None or memory.peak > best[1].peak:
            best = rank, memory
        if best[1].peak > most:
            break
    assert best is not None, "a pipeline has ranks"
    return best


def rank_memory(job: Job, rank: int) -> Memory:
    """Return the memory of a rank of the pipeline by the formula.

    After three times as many micro-batches as a pipeline has ranks it has held all that it holds at a time, but for the
    token ids of those that follow.
    """
    settings, placement = job.settings, job.placement
    step = Step(settings.micro_batch, settings.seq_len, settings.bf16, settings.recompute, settings.head_pieces)
    shown = min(settings.accumulation, 3 * placement.num_ranks)
    made, messages = _orders(settings.schedule, placement, shown)
    stages = {index: job.stages[index] for index in placement.stages_of(rank)}
    memory = stage_memory(job.model, job.layout, stages, made[rank], step, messages[rank])
    return replace(memory, activations=memory.activations + later_batches(job, shown))


def later_batches(job: Job, shown: int) -> float:
    """Return the bytes of token ids that a step holds beyond those of its first micro-batches."""
    return (job.settings.accumulation - shown) * batch_bytes(job.settings.micro_batch * job.settings.seq_len)


@lru_cache(maxsize=256)
def _orders(schedule: Schedule, placement: Placement, micro_batches: int) -> tuple[Orders, list[list[int]]]:
    made = orders(schedule, placement, micro_batches)
    return made, held_messages(made, placement)


def _by_expected_memory(placement: Placement) -> list[int]:
    """Return the ranks of a pipeline, those first that are likely to need most memory: its ends."""
    last = placement.num_ranks - 1
    return sorted(range(placement.num_ranks), key=lambda rank: min(rank, last - rank))


def fastest_of_each(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the fastest candidate of each pp, tp, dp and schedule, fastest first.

    Args:
        candidates: fastest first.
    """
    found: dict[tuple[object, ...], Candidate] = {}
    for one in candidates:
        choice = one.choice
        found.setdefault((choice.pp, choice.tp, choice.dp, choice.schedule), one)
    return list(found.values())


def groups(candidates: Sequence[Candidate], error: float) -> list[list[Candidate]]:
    """Return the candidates in groups that a prediction with this error cannot tell apart, fastest first.

    Args:
        candidates: fastest first.
        error: the relative error of a prediction; a group ends where its fastest is faster by more.
    """
    found: list[list[Candidate]] = []
    for one in candidates:
        if found and one.seconds <= found[-1][0].seconds * (1 + error):
            found[-1].append(one)
        else:
            found.append([one])
    return found
