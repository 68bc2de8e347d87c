"""The ranks that are run dry, and what they have shown."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, count, islice, takewhile

from conf.train_settings import OptimizerConfig
from launch.dry_run.pool import pool
from model.problems import BadInput
from parallel.dry_run import RankRun, run
from parallel.dry_run.distinct import RankClass, alone, classes
from parallel.dry_run.matching import Matching, match
from parallel.layout import ParallelConfig, problems
from parallel.plan.job import Job
from parallel.plan.operations import GroupKind
from parallel.plan.search import fullest
from parallel.schedules import batch_problems
from train.fit import changes
from train.optimizer import adamw

GIB = 2**30
Messages = dict[tuple[GroupKind, str, int], tuple[float, float, int]]
"""Number, bytes and a rank, by kind, operation and the ranks that messages go between."""
_TRIED = 3
"""The changes that are run dry, of those that would fit by the formula, until one does."""


@dataclass(frozen=True)
class Ran:
    """The ranks of a job that were run.

    Attributes:
        job: of which they are.
        optimizer: the settings of its optimizer.
        runs: of each class of ranks the one that was run.
    """

    job: Job
    optimizer: OptimizerConfig
    runs: Mapping[RankClass, RankRun]

    @cached_property
    def matching(self) -> Matching:
        """Whether the messages of the ranks pair up."""
        return match(self.job, self.runs)

    @cached_property
    def fullest(self) -> tuple[RankClass, RankRun]:
        """The rank that needs most, the first one of several."""
        return max(self.runs.items(), key=lambda one: needs(one[1]))

    def fits(self, room: float) -> bool:
        """Return whether every rank fits into so many bytes."""
        return needs(self.fullest[1]) <= room

    def messages(self) -> "Messages":
        """Return the messages of a whole step by kind, operation and the ranks that they go between.

        Returns:
            Their number and bytes on the rank that has the most bytes of them, and its global rank. A step of more
            micro-batches than were run has more of those that come with every micro-batch, within tensor-parallel
            ranks and between stages.
        """
        found: Messages = {}
        for ran in self.runs.values():
            more = self.job.settings.accumulation / ran.micro_batches
            number: Counter[tuple[GroupKind, str, int]] = Counter()
            size: Counter[tuple[GroupKind, str, int]] = Counter()
            for one in ran.exchanges:
                key = one.kind, one.operation, len(one.group)
                number[key] += 1
                size[key] += one.num_bytes
            for key in number:
                times = more if key[0] in (GroupKind.tp, GroupKind.pp) else 1.0
                if key not in found or size[key] * times > found[key][1]:
                    found[key] = number[key] * times, size[key] * times, ran.rank
        return found


def needs(run: RankRun) -> int:
    """Return the most bytes that a rank needs, in a step or while it is built."""
    return max(run.peak, run.building)


def chosen(job: Job, ranks: str) -> list[RankClass]:
    """Return the ranks to run.

    Args:
        job: of which they are.
        ranks: ``distinct``, ``all``, or global ranks with commas between.

    Raises:
        BadInput: some are no ranks of the job.
    """
    world = job.layout.world_size
    if ranks == "distinct":
        return classes(job)
    if ranks == "all":
        return [alone(job, rank) for rank in range(world)]
    words = [word.strip() for word in ranks.split(",")]
    wrong = [word for word in words if not word.isdecimal() or int(word) >= world]
    if wrong:
        some = "0" if world == 1 else f"0,{world - 1}"
        raise BadInput([f"--ranks={ranks}: {', '.join(map(repr, wrong))}: not among the ranks from 0 to {world - 1}; "
                        f"distinct, all, or some of them as in --ranks={some} would work"])  # fmt: skip
    return [alone(job, rank) for rank in sorted({int(word) for word in words})]


def run_all(job: Job, optimizer: OptimizerConfig, ranks: Sequence[RankClass]) -> Ran:
    """Run ranks, in as many processes as there are cores.

    Args:
        job: of which they are.
        optimizer: the settings of its optimizer.
        ranks: which.
    """
    make = partial(adamw, settings=optimizer)
    if len(ranks) == 1:
        return Ran(job, optimizer, {ranks[0]: run(job, ranks[0].rank, make_optimizer=make)})
    with pool(len(ranks)) as processes:
        waiting = [processes.submit(run, job, one.rank, make_optimizer=make) for one in ranks]
        return Ran(job, optimizer, {one: future.result() for one, future in zip(ranks, waiting, strict=True)})


def what_would_fit(ran: Ran, room: float) -> tuple[str, int] | None:
    """Return a change of the job that fits, as overrides, and the bytes that the rank which needs most then needs.

    Of the changes that the formula of `parallel/memory.py` lets fit, the first is taken whose dry run does: one of the
    settings, or else more stages.

    Args:
        ran: of the job that does not fit.
        room: the bytes that there are.
    """
    make, layout = partial(adamw, settings=ran.optimizer), ran.job.layout
    fitting = ((said, other, rank) for said, other in chain(changes(ran.job), _more_stages(ran.job))
               for rank, memory in [fullest(other)] if memory.peak <= room)  # fmt: skip
    for said, other, pipeline_rank in islice(fitting, _TRIED):
        ranks = {pipeline_rank * layout.dp * layout.tp}
        ranks |= {ran.fullest[0].rank} if other.layout == layout else set()
        most = max(needs(run(other, rank, make_optimizer=make)) for rank in ranks)
        if most <= room:
            return said, most
    return None


def _more_stages(job: Job) -> Iterator[tuple[str, Job]]:
    """Yield the job on twice as many pipeline ranks and more, as an override, as long as the model has layers."""
    layout, settings = job.layout, job.settings
    batch = settings.accumulation * settings.micro_batch * layout.dp
    for pp in takewhile(lambda pp: pp <= job.model.n_layers, (layout.pp * 2**power for power in count(1))):
        virtual = job.placement.virtual if layout.pp > 1 else None
        config = ParallelConfig(pp=pp, tp=layout.tp, schedule=settings.schedule, virtual_stages=virtual)
        if problems(config, job.model) or batch_problems(
            settings.schedule, pp, batch, settings.micro_batch * layout.dp
        ):
            continue
        other = replace(job, layout=replace(layout, pp=pp), settings=replace(settings, placement=config.placement))
        yield f"parallel.pp={pp} on {other.layout.world_size:,} GPUs", other
