"""Steps that others have measured and published, and their time as the planner predicts it; none is fitted to."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from conf.clusters import cluster_of
from launch.bench.practices import PRACTICES, Practice, PracticedLayers
from parallel.layout import Layout, Recompute
from parallel.plan.cluster import Cluster
from parallel.plan.costs import Prices, Reach, reaches
from parallel.plan.operations import GroupKind
from parallel.plan.replicas import LayerTime, layer_time, stage_time
from parallel.plan.steps import Exchange, RankTime, StageTime, Step, StepTime, step_seconds, step_time
from parallel.plan.work import Shape
from parallel.schedules import Placement, Schedule, placement_of

FILE = Path(__file__).parent / "published.csv"
MICRO_BATCHES = (1, 2, 4, 8)
"""The micro-batches of which the fastest is taken where a source does not say."""
VIRTUAL_STAGES = (1, 2, 3, 4, 6, 8)
"""The numbers of stages of a rank of which the fastest is taken where a source does not say."""


@dataclass(frozen=True)
class Row:
    """A step that was measured.

    Attributes:
        source: who published it; docs/planner.md says where.
        group: rows of the same model and GPUs, among which a plan would choose; empty for others.
        practice: of `launch.bench.practices.PRACTICES`.
        cluster: a preset; `inter_gb_per_s` is the network that the source had, of each GPU.
        gpus, layers, d_model, heads, kv_heads, d_ff, vocab, seq_len, global_batch: the run.
        micro_batch, virtual: 0 where the source does not say.
        tp, pp, schedule: the layout; the rest of the GPUs are replicas.
        split: how layers are cut into stages: even, rounded up (the last stage has what is left), or less at the ends
            (the first and the last stage have a block less).
        recompute: none, selective (attention) or full.
        unit: of `value`: s, sequences/s/GPU, TFLOP/s, or TFLOP/s as the source counts them.
        value: what was measured.
    """

    source: str
    group: str
    practice: str
    cluster: str
    inter_gb_per_s: float
    gpus: int
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    d_ff: int
    vocab: int
    seq_len: int
    global_batch: int
    micro_batch: int
    tp: int
    pp: int
    virtual: int
    split: str
    schedule: str
    recompute: str
    unit: str
    value: float

    @property
    def dp(self) -> int:
        """The number of replicas."""
        return self.gpus // (self.tp * self.pp)

    @property
    def seconds(self) -> float:
        """The seconds of a step, from the published value."""
        if self.unit == "s":
            return self.value
        if self.unit == "sequences/s/GPU":
            return self.global_batch / (self.value * self.gpus)
        return self.flops / (self.value * 1e12 * self.gpus)

    @property
    def flops(self) -> float:
        """The FLOPs of a step as the source counts them.

        "with recomputation" is equation 3 of arXiv 2104.04473; "attention whole" is
        `num_floating_point_operations` of Megatron-LM of July 2024. Else causal attention is halved.
        """
        d, s = self.d_model, self.seq_len
        tokens = self.global_batch * s
        if self.unit == "TFLOP/s with recomputation":
            return 96 * tokens * self.layers * d**2 * (1 + s / (6 * d) + self.vocab / (16 * self.layers * d))
        attention = 2 * d * d * (1 + self.kv_heads / self.heads)
        feed_forward = (3 if PRACTICES[self.practice].gated else 2) * d * self.d_ff
        scores = 2 * d * s * (1 if self.unit == "TFLOP/s, attention whole" else 0.5)
        return 6 * tokens * (self.layers * (attention + feed_forward + scores) + d * self.vocab)

    @property
    def layout(self) -> str:
        """The layout as a few words."""
        virtual = f" v{self.virtual}" if self.virtual > 1 else ""
        return f"tp{self.tp} pp{self.pp}{virtual} dp{self.dp} mb{self.micro_batch or '?'}"


def rows() -> list[Row]:
    """Return the published steps."""
    kinds = {one.name: one.type for one in fields(Row)}
    assert all(kind in (str, int, float) for kind in kinds.values()), "a row's values are text and numbers"
    with FILE.open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return [Row(**{name: _value(line[name], kind) for name, kind in kinds.items()}) for line in lines]


def _value(text: str, kind: Any) -> Any:
    return text if kind is str else kind(text or 0)


def predicted(row: Row) -> tuple[Row, StepTime]:
    """Predict a step, with the fastest of what its source does not say.

    Returns:
        The row with what was taken, and the prediction.
    """
    cluster = _cluster(row)
    found = [(one, _step(one, cluster)) for one in _complete(row)]
    taken, step = min(found, key=lambda pair: step_seconds(pair[1])) if len(found) > 1 else found[0]
    return taken, step_time(step)


def _cluster(row: Row) -> Cluster:
    cluster = _preset(row.cluster)
    size = cluster.gpus_per_node
    return replace(cluster, nodes=-(-row.gpus // size), inter_gb_per_s=row.inter_gb_per_s)


@lru_cache
def _preset(name: str) -> Cluster:
    return cluster_of(name)


def _complete(row: Row) -> Iterator[Row]:
    """Yield the row with each value of what it does not say that the run could have had."""
    ends = 2 if row.split == "less at the ends" else 0
    for micro_batch in [row.micro_batch] if row.micro_batch else MICRO_BATCHES:
        if row.global_batch % (row.dp * micro_batch):
            continue
        for virtual in [row.virtual] if row.virtual else VIRTUAL_STAGES if row.pp > 1 else (1,):
            if not row.virtual and (row.layers + ends) % (row.pp * virtual):
                continue
            rounds = row.global_batch // (row.dp * micro_batch)
            schedule = "1f1b" if row.pp == 1 or (virtual == 1 and row.schedule == "interleaved") else row.schedule
            if schedule == "interleaved" and rounds % row.pp:
                continue
            yield replace(row, micro_batch=micro_batch, virtual=virtual, schedule=schedule)


def _blocks(row: Row, num_stages: int) -> list[int]:
    """Return the number of blocks of each stage."""
    if row.split == "less at the ends":
        each = (row.layers + 2) // num_stages
        return [each - (stage == 0) - (stage == num_stages - 1) for stage in range(num_stages)]
    each = -(-row.layers // num_stages)
    return [max(min(each, row.layers - stage * each), 0) for stage in range(num_stages)]


def _step(row: Row, cluster: Cluster) -> Step:
    practice = PRACTICES[row.practice]
    placement = placement_of(Schedule[row.schedule], row.pp, row.virtual)
    cut = row.tp > 1 and practice.sequence_parallel
    cut = cut and not (row.practice == "megatron-2022" and row.recompute == "full")
    shape = Shape(
        (row.d_model, row.heads, row.kv_heads, row.d_model // row.heads, row.d_ff, row.vocab),
        row.tp,
        cut,
        row.micro_batch,
        row.seq_len,
        2,
        Recompute.none,
        1,
    )
    layout = Layout(row.dp, row.pp, row.tp, cut)
    prices, where = Prices(cluster), reaches(layout, cluster.gpus_per_node)
    made = PracticedLayers(shape, practice, row.recompute)
    layers = [layer_time(work, prices, where) for work in (made.embedding(), made.block(), made.head())]
    blocks = _blocks(row, placement.num_stages)
    last = placement.num_stages - 1
    link = _link(row, practice, cut, prices, where)
    stages = [
        _blocked(stage_time(list(zip(layers, (int(at == 0), number, int(at == last)), strict=True))), practice, link)
        for at, number in enumerate(blocks)
    ]
    links = [0.0 if practice.links_block else link] * last
    ranks = [_rank(row, practice, placement, rank, blocks, layers, prices, where) for rank in range(row.pp)]
    micro_batches = row.global_batch // (row.dp * row.micro_batch)
    return Step(
        Schedule[row.schedule],
        placement,
        micro_batches,
        stages,
        links,
        ranks,
        prices.agreement(where[GroupKind.world]),
        practice.overlaps_replicas,
    )


def _link(row: Row, practice: Practice, cut: bool, prices: Prices, where: dict[GroupKind, Reach]) -> float:
    """Return the seconds of a message between stages, with the gather of its parts where these are scattered."""
    size = row.micro_batch * row.seq_len * row.d_model * 2
    if row.pp == 1:
        return 0.0
    if cut:
        return prices.message("send", size / row.tp, where[GroupKind.pp])
    if row.tp == 1:
        return prices.message("send", size, where[GroupKind.pp])
    part = prices.message("send", size / row.tp, where[GroupKind.pp])
    return part + prices.message("all_gather", size, where[GroupKind.tp])


def _blocked(stage: StageTime, practice: Practice, link: float) -> StageTime:
    """Have a stage wait for its messages where it does: to send what it has made, and to receive what it needs next."""
    if practice.links_block and link:
        for one in (stage.forward, stage.backward, stage.input_gradient):
            one.exposed += link
    return stage


def _rank(
    row: Row,
    practice: Practice,
    placement: Placement,
    rank: int,
    blocks: Sequence[int],
    layers: Sequence[LayerTime],
    prices: Prices,
    where: dict[GroupKind, Reach],
) -> RankTime:
    """Return what a rank does around its passes."""
    embedding, block, head = (layer.work.parameters for layer in layers)
    own = placement.stages_of(rank)
    first, last = 0 in own, placement.num_stages - 1 in own
    parameters = sum(blocks[stage] for stage in own) * block + first * embedding + last * head
    if practice.tied and first and last:
        parameters -= head
    share = parameters / row.dp if practice.sharded else parameters
    after = prices.traffic(share * 4)
    if practice.tied and (first or last) and row.pp > 1:
        after += prices.message("all_reduce", head * practice.gradient_bytes, where[GroupKind.pp])
    # Gradient, weight and two moments are read, weight and moments written in fp32; the weight is cast to 16 bits.
    optimizer = prices.traffic(share * 7 * 4) + prices.traffic(share * 6)
    if row.dp == 1:
        return RankTime((), after, optimizer)
    operation = "reduce_scatter" if practice.sharded and practice.overlaps_replicas else "all_reduce"
    reduce = prices.message(operation, parameters * practice.gradient_bytes, where[GroupKind.dp])
    gather = prices.message("all_gather", parameters * 2, where[GroupKind.dp]) if practice.sharded else 0.0
    # In pieces of a block each, the first of which is needed first, and ready last.
    pieces = max(sum(blocks[stage] for stage in own), 1)
    exchanges = []
    for stage in own:
        for at in range(max(blocks[stage], 1)):
            one = layers[1].times
            exchanges.append(
                Exchange(
                    reduce / pieces,
                    gather / pieces,
                    (stage, (blocks[stage] - at) * one.forward.seconds),
                    ((stage, at * one.backward.seconds),),
                )
            )
    return RankTime(tuple(exchanges), after, optimizer)


def parts(time: StepTime) -> dict[str, float]:
    """Return where the seconds go, by name."""
    return {name: value for name, value in time._asdict().items() if name != "seconds"}
