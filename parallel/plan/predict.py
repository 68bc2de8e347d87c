"""The time of a training step of a job on a cluster, and where it goes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from parallel.plan.cluster import Cluster
from parallel.plan.costs import Prices, Reach, reaches
from parallel.plan.job import Job
from parallel.plan.operations import GroupKind
from parallel.plan.replicas import LayerTime, layer_time, rank_time, stage_time
from parallel.plan.shared import shared_step_time
from parallel.plan.steps import StageTime, Step, StepTime, step_seconds, step_time
from parallel.plan.work import Shape, layers_of, shape_of
from parallel.schedules import orders, splits_backward
from parallel.simulation import Costs, Timeline, simulate

ERROR = 0.08
"""The mean relative error against published steps (docs/planner.md): layouts that are closer than that are equal."""


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a step, and where it goes, averaged over the ranks of a pipeline.

    The parts add up: those of `compute` and `exposed`, `optimizer` and `waiting` are `seconds`.

    Attributes:
        job: the job.
        cluster: the cluster.
        seconds: of a step.
        costs: the seconds of each stage's passes.
        step: what decides the seconds.
        error: the relative error that predictions have had.
    """

    job: Job
    cluster: Cluster
    seconds: float
    costs: Costs = field(repr=False)
    step: Step = field(repr=False)
    error: float = ERROR

    @cached_property
    def time(self) -> StepTime:
        """Where the seconds go, which takes twice as long as to predict them: found when first asked for."""
        return _step_time(self.job, self.cluster, self.step)

    @property
    def compute(self) -> dict[str, float]:
        """Seconds by kind of operation, recomputation included: ``products``, ``attention``, ``traffic`` (kernels that
        are bound by memory) and ``host`` (the device waits for its host)."""
        return {name: getattr(self.time, name) for name in ("products", "attention", "traffic", "host")}

    @property
    def exposed(self) -> dict[str, float]:
        """Seconds by kind of message, ``tp``, ``pp`` and ``dp``, in which nothing is computed."""
        return {name: getattr(self.time, name) for name in ("tp", "pp", "dp")}

    @property
    def optimizer(self) -> float:
        """Seconds of the update of the master weights."""
        return self.time.optimizer

    @property
    def waiting(self) -> float:
        """Seconds in which a rank waits for others, by the schedule and by uneven stages."""
        return self.time.waiting

    @property
    def bubble(self) -> float:
        """The share of the step in which ranks wait for others."""
        return self.waiting / self.seconds

    @property
    def shares_devices(self) -> bool:
        """Whether ranks share cores, so that passes take longer while others compute: `costs` are of a core's own."""
        devices = self.cluster.devices_per_node
        return devices is not None and devices < min(self.job.layout.world_size, self.cluster.gpus_per_node)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Tokens of all replicas a second, over the GPUs of the layout."""
        return self.job.tokens_per_step / self.seconds / self.job.layout.world_size

    @property
    def mfu(self) -> float:
        """The share of the GPUs' bf16 peak, by the FLOPs that the model needs with causal attention halved."""
        return self._share(self.job.model.flops_per_token(self.job.settings.seq_len))

    @property
    def mfu_whole_attention(self) -> float:
        """The same with causal attention counted whole."""
        return self._share(self.job.model.flops_per_token_whole_attention(self.job.settings.seq_len))

    def _share(self, flops_per_token: int) -> float:
        return self.tokens_per_second_per_gpu * flops_per_token / (self.cluster.peak_tflops * 1e12)

    @cached_property
    def timeline(self) -> Timeline:
        """The passes of a whole step on every rank of a pipeline, simulated when first asked for."""
        settings = self.job.settings
        made = orders(settings.schedule, self.job.placement, settings.accumulation)
        return simulate(made, self.job.placement, self.costs)


def predict(job: Job, cluster: Cluster) -> Prediction:
    """Predict the time of a training step.

    Args:
        job: the job, whose layout `parallel.layout.problems` accepts.
        cluster: the cluster, which has at least as many GPUs as the layout.
    """
    settings, placement, shape = job.settings, job.placement, shape_of(job)
    prices = Prices(cluster, shape.bytes_per_value)
    where = reaches(job.layout, cluster.gpus_per_node)
    kinds = {window: _layer_times(shape_of(job, window), prices, where) for window in job.model.windows}
    embedding, _, head = next(iter(kinds.values()))
    per_layer = [embedding, *(kinds[window][1] for window in job.model.windows), head]
    stages = [_stage_time(per_layer[stage.start : stage.stop]) for stage in job.stages]
    hop = shape.micro_batch * shape.seq_len * job.model.d_model * shape.bytes_per_value
    hop //= job.layout.tp if job.layout.sequence_parallel else 1
    links = [prices.message("send", hop, reach) for reach in _link_reaches(job, cluster.gpus_per_node)]
    step = Step(
        settings.schedule,
        placement,
        settings.accumulation,
        stages,
        links,
        [rank_time(job, rank, per_layer, prices, where) for rank in range(placement.num_ranks)],
        prices.agreement(where[GroupKind.world]),
        overlap=prices.beside,
    )
    forward, whole, split, weights = ([one.seconds for one in kind] for kind in zip(*stages, strict=True))
    backward = split if splits_backward(settings.schedule) else [a - b for a, b in zip(whole, weights, strict=True)]
    costs = Costs(forward, backward, weights, max(links, default=0.0))
    if cluster.devices_per_node is None:
        return Prediction(job, cluster, step_seconds(step), costs, step)
    return Prediction(job, cluster, _step_time(job, cluster, step).seconds, costs, step)


def _step_time(job: Job, cluster: Cluster, step: Step) -> StepTime:
    if cluster.devices_per_node is None:
        return step_time(step)
    nodes = -(-job.layout.world_size // cluster.gpus_per_node)
    return shared_step_time(
        step, job.layout.dp * job.layout.tp, nodes * cluster.devices_per_node, cluster.crowded_share
    )


def _layer_times(shape: Shape, prices: Prices, where: Mapping[GroupKind, Reach]) -> Sequence[LayerTime]:
    """Return the times of the embedding, a block and the head, which a search asks for again and again."""
    key = (shape, where[GroupKind.tp], repr(prices.cluster))
    if key not in _LAYER_TIMES:
        if len(_LAYER_TIMES) > _MOST_KEPT:
            _LAYER_TIMES.clear()
        layers = layers_of(shape)
        _LAYER_TIMES[key] = [layer_time(work, prices, where) for work in (layers.embedding, layers.block, layers.head)]
    return _LAYER_TIMES[key]


_LAYER_TIMES: dict[tuple[Shape, Reach, str], Sequence[LayerTime]] = {}
_MOST_KEPT = 4096


def _stage_time(layers: Sequence[LayerTime]) -> StageTime:
    """Return the time of a stage's passes, of which layers of one kind are one object."""
    kinds, numbers = {id(layer): layer for layer in layers}, Counter(map(id, layers))
    return stage_time([(layer, numbers[at]) for at, layer in kinds.items()])


def _link_reaches(job: Job, gpus_per_node: int) -> list[Reach]:
    """Return where each stage and the next one are: the pair of ranks, of all replicas, that are farthest apart."""
    size = job.layout.dp * job.layout.tp
    found = []
    for stage in range(job.placement.num_stages - 1):
        a, b = (job.placement.rank_of(one) * size for one in (stage, stage + 1))
        apart = any((a + at) // gpus_per_node != (b + at) // gpus_per_node for at in range(size))
        found.append(Reach(1 if a == b else 2, 1 if apart else 2))
    return found
