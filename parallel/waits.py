"""Who waits for whom, by the heartbeats of the ranks, and so who it is that a run which does not move waits for.

Each rank is at a point of one order that all of them go through: steps, in a step the passes and then the phases. A
rank that receives waits for another one as long as that has not run the pass in question; one in a collective waits
for those of the collective's ranks that have not come to it. Whoever waits for nobody, while others wait for it, is
the culprit: it computes without end, reads from a disk that does not answer, is stopped, or has been sent what it has
not received.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from parallel.heartbeat import OF_ALL, Beat, Phase
from parallel.layout import Layout

_ORDER = {
    **{Phase.START: 0, Phase.LOAD: 1},
    **dict.fromkeys((Phase.DATA, Phase.RECEIVE, Phase.PASS, Phase.SEND), 2),
    **{Phase.REDUCE: 3, Phase.TASKS: 3, Phase.AGREE: 4, Phase.EVALUATE: 4, Phase.UPDATE: 5, Phase.KEEP: 5},
    **{Phase.REPORT: 6, Phase.RECORD: 7, Phase.SAVE: 8, Phase.SAMPLE: 9, Phase.END: 10},
}
_PASSES = _ORDER[Phase.PASS]
_WITHIN = {Phase.DATA: 0.0, Phase.RECEIVE: 0.0, Phase.PASS: 0.25, Phase.SEND: 0.5}
"""How far a rank has come in a pass of its order; it only waits for receipts where the result of the pass is there."""
Position = tuple[int, int, int, float]


@dataclass(frozen=True)
class Verdict:
    """What the heartbeats of a run that does not move say.

    Attributes:
        waits: the ranks that each rank waits for; none for one that waits for nobody.
        culprits: the ranks that wait for nobody and that others wait for, or that are stopped or gone, by rank.
        certain: whether these are told apart from the others; if not, no rank is known to be the one.
    """

    waits: Mapping[int, tuple[int, ...]]
    culprits: tuple[int, ...]
    certain: bool


def judge(beats: Mapping[int, Beat | None], layout: Layout, halted: Mapping[int, str]) -> Verdict:
    """Find the ranks that the others wait for.

    Args:
        beats: the last heartbeat of each rank; None for one that has given none.
        layout: the rank grid.
        halted: the ranks that are known not to run, with a word for how: stopped, ended.
    """
    waits = {rank: _awaited(rank, beats, layout) for rank in beats}
    if halted:
        return Verdict(waits, tuple(sorted(halted)), certain=True)
    awaited = {rank for ranks in waits.values() for rank in ranks}
    culprits = tuple(sorted(rank for rank in awaited if not waits[rank]))
    if culprits:
        return Verdict(waits, culprits, certain=True)
    idle = tuple(sorted(rank for rank in waits if not waits[rank]))
    return Verdict(waits, idle or tuple(sorted(waits)), certain=len(idle) == 1)


def _awaited(rank: int, beats: Mapping[int, Beat | None], layout: Layout) -> tuple[int, ...]:
    """Return the ranks that a rank waits for."""
    beat = beats[rank]
    if beat is None:
        return ()

    def behind(peers: Iterable[int], point: Position) -> tuple[int, ...]:
        return tuple(peer for peer in peers if peer != rank and _position(beats.get(peer)) < point)

    step, evaluating, *_ = own = _position(beat)
    if beat.phase in (Phase.RECEIVE, Phase.SEND):
        # A result is there once its pass is over; what was sent is received once the pass that needs it has begun.
        further = _WITHIN[Phase.SEND] if beat.phase is Phase.RECEIVE else _WITHIN[Phase.PASS]
        return behind([beat.peer], (step, evaluating, _PASSES, beat.awaited + further))
    if beat.phase in (Phase.PASS, Phase.REDUCE):
        sharing = _sharing(layout, rank) if beat.in_collective else ()
        late = [peer for peer in sharing if peer in beats and _collectives(beats[peer]) < beat.collectives]
        # The weights of a step are gathered from the replicas as its first passes need them.
        point = own if beat.phase is Phase.REDUCE else (step, 0, 0, 0.0)
        return tuple(late) or behind([peer for peer in _replicas(layout, rank) if peer in beats], point)
    if beat.phase in OF_ALL:
        return behind(beats, own)
    return ()


def _position(beat: Beat | None) -> Position:
    """Place a rank in the order that all go through; passes by their index, a little further as they come on."""
    if beat is None:
        return (-1, 0, 0, 0.0)
    index = 0.0
    if _ORDER[beat.phase] == _PASSES:
        index = beat.index + _WITHIN[beat.phase]
    return (beat.step, beat.evaluating, _ORDER[beat.phase], index)


def _collectives(beat: Beat | None) -> int:
    return -1 if beat is None else beat.collectives


def _sharing(layout: Layout, rank: int) -> range:
    """Return the ranks that share the matrices of a rank, itself among them."""
    first = rank - layout.tp_rank(rank)
    return range(first, first + layout.tp)


def _replicas(layout: Layout, rank: int) -> range:
    """Return the ranks that hold the same part of the model as a rank, itself among them."""
    of_stage = layout.dp * layout.tp
    first = layout.stage(rank) * of_stage + layout.tp_rank(rank)
    return range(first, first + of_stage, layout.tp)
