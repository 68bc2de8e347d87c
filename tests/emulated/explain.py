"""Why ranks that are played by NCCL's rules have come to no end: who waits for whom, around to the first again."""

from collections.abc import Iterator

from tests.emulated.nccl import Play
from tests.emulated.notes import COMPUTE_STREAM, NONE

Host = tuple[str, int]
Kernel = tuple[str, int]


def why(play: Play) -> str:
    """A circle of waits, a line for each host or device that waits for the next; for one that has ended, nothing."""
    ranks = range(len(play.at))
    start = next((("host", rank) for rank in ranks if play.at[rank] < len(play.programs.ops[rank])), None)
    start = start or next((("kernel", node) for node, done in enumerate(play.done) if not done), None)
    if start is None:
        return ""
    path: list[tuple[str, int]] = []
    lines: list[str] = []
    thing = start
    while thing not in path:
        path.append(thing)
        nexts = list(_waits_for(play, thing))
        if not nexts:
            return "\n".join([*lines, f"{_name(play, thing)}, which waits for nothing that is there"])
        reason, following = nexts[0]
        lines.append(f"{_name(play, thing)} {reason}")
        thing = following
    circle = path.index(thing)
    return "\n".join([*lines[circle:], f"{_name(play, thing)}: around"])


def _name(play: Play, thing: tuple[str, int]) -> str:
    what, number = thing
    if what == "host":
        note = play.programs.notes[number][play.at[number]] if play.at[number] < len(play.programs.ops[number]) else "-"
        return f"host {number} at note {play.at[number]} {note}"
    rank = play.rank_of[number]
    index = next(index for index, node in play.nodes[rank].items() if node == number)
    state = "spinning" if play.started[number] else "not started"
    return f"device {rank} with note {index} {play.programs.notes[rank][index]}, {state},"


def _waits_for(play: Play, thing: tuple[str, int]) -> Iterator[tuple[str, tuple[str, int]]]:
    what, number = thing
    yield from _host_waits_for(play, number) if what == "host" else _kernel_waits_for(play, number)


def _host_waits_for(play: Play, rank: int) -> Iterator[tuple[str, tuple[str, int]]]:
    index = play.at[rank]
    if index >= play.limit[rank]:
        return
    op = play.programs.ops[rank][index]
    pending = [node for node in play.nodes[rank].values() if not play.done[node]]
    if pending and (play.everywhere or index in play.device_waits.get(rank, ())):
        yield "waits for its whole device:", ("kernel", pending[0])
    if pending and op.reads:
        yield "waits for a value:", ("kernel", play.tails[rank][COMPUTE_STREAM])
    if op.connection != NONE and play.rules.first_use:
        members = play.programs.members[op.connection]
        for other in members:
            if other not in play.arrived[op.connection]:
                yield "connects at first use with:", ("host", other)


def _kernel_waits_for(play: Play, node: int) -> Iterator[tuple[str, tuple[str, int]]]:
    rank = play.rank_of[node]
    queue = play.queue_of[node]
    if not play.started[node]:
        if queue and queue[0] != node:
            yield "is behind, in its hardware queue:", ("kernel", queue[0])
        for one in play.after[node]:
            if not play.done[one]:
                yield "comes after:", ("kernel", one)
        return
    index = next(index for index, own in play.nodes[rank].items() if own == node)
    match = play.programs.ops[rank][index].match
    for other, ops in enumerate(play.programs.ops):
        for place, op in enumerate(ops):
            if op.match == match and other != rank:
                if place not in play.nodes[other]:
                    yield "needs what is not launched by:", ("host", other)
                elif not play.started[play.nodes[other][place]]:
                    yield "needs:", ("kernel", play.nodes[other][place])
