"""Whoever a run waits for is found, by where each rank is: wherever any rank stops, under every schedule."""

import pytest

from parallel.heartbeat import Beat, Phase
from parallel.layout import Layout
from parallel.schedules import Pass, Schedule, consumer_of, orders, placement_of, receiver_of, source_of
from parallel.simulation import programs
from parallel.waits import judge

PIPELINES = {"1f1b": 1, "interleaved": 2, "zero_bubble": 1, "zbv": 2, "dualpipev": 2}
P, M = 4, 8


def beat(rank, phase, step=5, **more):
    told = dict(what=Pass.F, stage=0, micro_batch=0, index=0, peer=-1, awaited=-1, evaluating=0, collectives=0)
    told |= {"in_collective": False, "on_device": False, **more}
    return Beat(beats=9, time=1.0, step=step, phase=phase, rank=rank, pid=1, host="a", **told)


def stopped_at(rank, index, schedule, placement):
    """The heartbeats of all ranks, once all has run that does not need a pass of this rank, which it does not end."""
    order = orders(schedule, placement, M)
    of_all = programs(order, placement)
    done = [0] * P
    ended = set()
    moved = True

    def needs(at):
        source = source_of(order[at][done[at]], placement)
        return source if source is not None and placement.rank_of(source.stage) != at else None

    while moved:
        moved = False
        for at in range(P):
            while done[at] < (index if at == rank else len(order[at])):
                if (needs(at) or order[at][done[at]]) not in ended | {order[at][done[at]]}:
                    break
                ended.add(order[at][done[at]])
                done[at] += 1
                moved = True
    beats = {}
    for at in range(P):
        if done[at] == len(order[at]):
            unread = [
                a
                for a in order[at]
                if receiver_of(a, placement) not in (None, at) and not taken(a, order, done, placement, rank)
            ]
            beats[at] = beat(at, Phase.AGREE)
            if unread:
                reader = consumer_of(unread[0])
                to = placement.rank_of(reader.stage)
                beats[at] = beat(at, Phase.SEND, index=len(order[at]) - 1, peer=to, awaited=of_all[at].index[reader])
            continue
        source = needs(at)
        if source is None or source in ended:
            assert at == rank
            beats[at] = beat(at, Phase.PASS, index=done[at])
        else:
            whose = placement.rank_of(source.stage)
            beats[at] = beat(at, Phase.RECEIVE, index=done[at], peer=whose, awaited=of_all[at].index[source])
    return beats


def taken(action, order, done, placement, computing):
    """Whether the rank that needs it has received the result of an action; one that computes has its pass's input."""
    reader = consumer_of(action)
    whose = placement.rank_of(reader.stage)
    return order[whose].index(reader) < done[whose] + (whose == computing)


@pytest.mark.parametrize("schedule", PIPELINES)
def test_a_rank_that_stops_in_any_pass_of_any_schedule_is_the_one(schedule):
    virtual = PIPELINES[schedule]
    placement, layout = placement_of(Schedule(schedule), P, virtual), Layout(1, P, 1)
    seen = 0
    for rank in range(P):
        for index, _ in enumerate(orders(Schedule(schedule), placement, M)[rank]):
            beats = stopped_at(rank, index, Schedule(schedule), placement)
            if beats[rank].phase is Phase.RECEIVE:  # it waits itself, since it cannot come so far without that pass
                continue
            verdict = judge(beats, layout, {})
            assert verdict.culprits == (rank,) and verdict.certain, (rank, index, beats)
            seen += 1
    assert seen > P * M


def named(beats, layout, halted=None):
    verdict = judge(
        {b if isinstance(b, int) else b.rank: None if isinstance(b, int) else b for b in beats}, layout, halted or {}
    )
    return verdict.culprits, verdict.certain


def test_one_that_has_been_sent_what_it_has_not_received_is_the_one():
    waits = beat(1, Phase.RECEIVE, index=3, peer=0, awaited=2)
    assert named([beat(0, Phase.AGREE), waits], Layout(1, 2, 1)) == ((1,), True)
    assert named([beat(0, Phase.PASS, index=2), waits], Layout(1, 2, 1)) == ((0,), True)
    not_yet = beat(0, Phase.RECEIVE, index=2, peer=1, awaited=3)
    assert named([not_yet, waits], Layout(1, 2, 1)) == ((0, 1), False)  # each waits for the other


def test_replicas_wait_for_one_that_has_not_come_to_their_sum_and_all_for_one_that_has_not_come_to_theirs():
    layout = Layout(2, 2, 1)
    computes = beat(3, Phase.PASS, index=7)
    assert named([beat(0, Phase.AGREE), beat(1, Phase.AGREE), beat(2, Phase.REDUCE), computes], layout) == ((3,), True)
    late = [beat(0, Phase.REPORT), beat(1, Phase.UPDATE), beat(2, Phase.REPORT), beat(3, Phase.REPORT)]
    assert named(late, layout) == ((1,), True)
    traced = [beat(0, Phase.KEEP), *[beat(rank, Phase.REPORT) for rank in (1, 2, 3)]]
    assert named(traced, layout) == ((0,), True)  # a trace takes long to write
    records = [beat(0, Phase.RECORD), beat(1, Phase.PASS, 6), beat(2, Phase.AGREE, 6), beat(3, Phase.AGREE, 6)]
    assert named(records, layout) == ((0,), True)  # of whose weights the others gather a part
    assert named([beat(rank, Phase.AGREE) for rank in range(4)], layout) == ((0, 1, 2, 3), False)
    assert named([0, *[beat(rank, Phase.START, 0) for rank in (1, 2, 3)]], layout) == ((0,), True)


def test_of_ranks_that_share_matrices_in_one_pass_it_is_the_one_that_is_not_in_their_collective():
    layout = Layout(1, 2, 2)
    stage_0 = [beat(rank, Phase.PASS, index=2, collectives=9 - rank, in_collective=rank == 0) for rank in (0, 1)]
    stage_1 = [beat(rank, Phase.RECEIVE, index=1, peer=rank - 2, awaited=2) for rank in (2, 3)]
    assert named([*stage_0, *stage_1], layout) == ((1,), True)
    compute = [beat(rank, Phase.PASS, index=2, collectives=9 - rank) for rank in (0, 1)]
    assert named([*compute, *stage_1], layout) == ((0, 1), True)  # neither waits for the other


def test_one_that_is_stopped_is_the_one_wherever_it_is():
    both = [beat(0, Phase.AGREE), beat(1, Phase.AGREE)]
    assert named(both, Layout(2, 1, 1), {1: "stopped"}) == ((1,), True)


def test_a_validation_is_another_place_than_the_step_before_it():
    ahead = beat(0, Phase.RECEIVE, index=0, peer=1, awaited=3, evaluating=1)
    behind = beat(1, Phase.RECORD)
    assert named([ahead, behind], Layout(1, 2, 1)) == ((1,), True)


def test_one_of_four_thousand_ranks_is_found():
    layout = Layout(32, 16, 8, sequence_parallel=True)
    culprit = 2345
    first = culprit - layout.tp_rank(culprit)
    beats = {rank: beat(rank, Phase.PASS, collectives=7, in_collective=True) for rank in range(layout.world_size)}
    beats[culprit] = beat(culprit, Phase.PASS, collectives=6)
    verdict = judge(beats, layout, {})
    assert verdict.culprits == (culprit,) and verdict.certain
    assert {rank for rank, ranks in verdict.waits.items() if ranks} == {*range(first, first + 8)} - {culprit}
    late = {rank: beat(rank, Phase.REDUCE) for rank in range(layout.world_size)}
    late[culprit] = beat(culprit, Phase.PASS, index=3)
    waiting = {rank for rank, ranks in judge(late, layout, {}).waits.items() if ranks == (culprit,)}
    assert waiting == {r for r in beats if (layout.stage(r), layout.tp_rank(r)) == (9, 1)} - {culprit}
