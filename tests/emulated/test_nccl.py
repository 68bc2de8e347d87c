"""The player of NCCL's rules: for each rule a program that hangs by it, and one like it that ends."""

import pytest

from tests.emulated.explain import why
from tests.emulated.nccl import Rules, play, waits_at_a_pass_that_hang, waits_that_hang
from tests.emulated.notes import numbered

CONNECTED = Rules(first_use=False)


def send(to, group="pipeline"):
    return ("send", group, to, 1)


def recv(source, group="pipeline"):
    return ("recv", group, source, 1)


def collective(ranks, what="all_reduce", group="world", asynchronous=False):
    return ("collective", group, tuple(ranks), asynchronous, what)


def wait(number):
    return ("wait", number)


COMPUTE, READ = ("compute", "pass"), ("read", "loss")

FIRST_ASKS = [
    [recv(1, "up"), COMPUTE, send(1, "down"), wait(0), wait(2)],
    [recv(0, "down"), wait(0), COMPUTE, send(0, "up"), wait(3)],
]
"""Each rank asks for what it will need later before it sends, over a group for each direction."""
IN_ORDER = [
    [COMPUTE, send(1, "down"), recv(1, "up"), wait(2), wait(1)],
    [recv(0, "down"), wait(0), COMPUTE, send(0, "up"), wait(3)],
]


def test_hosts_wait_for_each_other_at_a_first_message():
    hung = play(FIRST_ASKS)
    assert not hung.ended and play(FIRST_ASKS, CONNECTED).ended and play(IN_ORDER).ended
    assert why(hung).count("connects at first use with") == 2 and not why(play(IN_ORDER))


def test_what_was_connected_once_needs_no_host_again():
    warmed = [[send(1, "down"), recv(1, "up")], [recv(0, "down"), send(0, "up")]]
    shifted = [[(*note[:1], note[1] + 2) if note[0] == "wait" else note for note in own] for own in FIRST_ASKS]
    assert play([first + then for first, then in zip(warmed, shifted, strict=True)]).ended


def test_both_directions_between_two_ranks_of_a_group_share_a_stream():
    """A receive that is posted early spins on the stream that the message it indirectly waits for needs."""

    def programs(down, up):
        return [
            [recv(1, up), COMPUTE, send(1, down), wait(0)],
            [recv(0, down), wait(0), COMPUTE, send(0, up)],
        ]

    assert play(programs("down", "up"), CONNECTED).ended
    hung = play(programs("pipeline", "pipeline"), CONNECTED)
    assert not hung.ended and "comes after" in why(hung)


def test_messages_of_several_pairs_share_a_stream_where_groups_are_bound_to_a_device():
    """Rank 1 receives from 2 before it sends to 0; over one communicator it then waits for rank 0's answer to that."""
    programs = [
        [recv(1), wait(0), send(2), wait(2)],
        [recv(2), send(0), wait(0), wait(1)],
        [recv(0), wait(0), send(1), wait(2)],
    ]
    assert play(programs, CONNECTED).ended
    assert not play(programs, Rules(first_use=False, eager=True)).ended
    ordered = [programs[0], [send(0), recv(2), wait(0), wait(1)], programs[2]]
    assert play(ordered, Rules(eager=True)).ended and play(ordered).ended


def test_a_kernel_comes_after_what_the_compute_stream_was_told_before():
    """A send that is told after a wait for the answer to it never starts, though the host goes on."""
    hung = play([[recv(1, "up"), wait(0), send(1, "down")], [recv(0, "down"), wait(0), send(0, "up")]], CONNECTED)
    assert not hung.ended and hung.at == [3, 3]
    assert play([[send(1, "down"), recv(1, "up"), wait(1)], [recv(0, "down"), wait(0), send(0, "up")]], CONNECTED).ended


def test_wait_makes_the_compute_stream_wait_and_not_the_host():
    waits_first = [[recv(1, "up"), wait(0), COMPUTE, READ], [COMPUTE, READ, send(0, "up")]]
    assert play(waits_first, CONNECTED).ended
    nobody_sends = play([[recv(1), wait(0), COMPUTE, COMPUTE], []], CONNECTED)
    assert nobody_sends.at[0] == 4 and nobody_sends.pending[0] == 4 and not nobody_sends.ended


def test_a_host_that_asks_for_a_value_waits_for_the_compute_stream_alone():
    asks = [[recv(1, "up"), COMPUTE, READ, send(1, "down")], [recv(0, "down"), wait(0), send(0, "up")]]
    assert play(asks, CONNECTED).ended  # the message still spins, and does not matter
    after = [[recv(1, "up"), wait(0), READ, send(1, "down")], asks[1]]
    hung = play(after, CONNECTED)
    assert not hung.ended and "waits for a value" in why(hung)
    assert play([[READ, COMPUTE]]).ended


def test_a_device_wide_wait_needs_all_that_was_launched():
    assert play(FIRST_ASKS, CONNECTED).ended
    hung = play(FIRST_ASKS, CONNECTED, device_waits={0: {1}})
    assert not hung.ended and "waits for its whole device" in why(hung)
    assert play(FIRST_ASKS, CONNECTED, device_waits={0: {0, 3}, 1: {2}}).ended
    assert play(IN_ORDER, everywhere=True).ended and not play(FIRST_ASKS, CONNECTED, everywhere=True).ended


def test_the_sweep_finds_the_places_that_single_plays_find():
    for notes in (FIRST_ASKS, IN_ORDER):
        for rules in (CONNECTED, Rules(first_use=False, queues=2)):
            places = [(rank, index) for rank, own in enumerate(notes) for index in range(len(own))]
            one_by_one = [at for at in places if not play(notes, rules, device_waits={at[0]: {at[1]}}).ended]
            assert list(waits_that_hang(numbered(notes), rules)) == one_by_one
    assert list(waits_that_hang(numbered(FIRST_ASKS), CONNECTED)) == [(0, 1), (0, 2)]
    assert list(waits_at_a_pass_that_hang(numbered(FIRST_ASKS), CONNECTED)) == [0]
    assert not list(waits_at_a_pass_that_hang(numbered(IN_ORDER), Rules()))


def test_streams_that_share_a_hardware_queue_hold_each_other_up():
    """A second receive waits for the first on their stream, and holds up a send behind it that would bring both."""
    programs = [
        [COMPUTE, recv(1, "up"), recv(1, "up"), send(1, "down")],
        [recv(0, "down"), wait(0), send(0, "up"), send(0, "up")],
    ]
    assert {queues: play(programs, Rules(False, queues)).ended for queues in (None, 1, 2, 3)} == {
        **{None: True, 1: False, 2: True, 3: True}
    }
    assert "in its hardware queue" in why(play(programs, Rules(False, 1)))
    between = [[*programs[0][:3], send(2, "aside"), programs[0][3]], programs[1], [recv(0, "aside")]]
    assert not play(between, Rules(False, 2)).ended  # round robin: compute, up, aside and down are queues 0, 1, 0 and 1
    assert play(IN_ORDER, Rules(False, 1)).ended


def test_collectives_end_when_all_ranks_of_the_group_have_come():
    everyone, pair = collective(range(3)), collective([0, 1], group="pair")
    assert play([[pair, everyone], [pair, everyone], [everyone]]).ended
    assert not play([[pair, everyone], [everyone, pair], [everyone]]).ended
    assert not play([[pair], [COMPUTE]]).ended


def test_asynchronous_collectives_leave_the_compute_stream_alone():
    def crossed(asynchronous):
        one, other = (collective([0, 1], group=group, asynchronous=asynchronous) for group in "ab")
        return [[one, other], [other, one]]

    assert play(crossed(True), CONNECTED).ended and not play(crossed(True)).ended
    assert not play(crossed(False), CONNECTED).ended


def test_ranks_that_disagree_on_a_collective_are_told():
    with pytest.raises(ValueError, match="rank 1 says"):
        numbered([[collective([0, 1], "all_reduce")], [collective([0, 1], "broadcast")]])
    with pytest.raises(ValueError, match="rank 1 says"):
        numbered([[("send", "up", 1, 8)], [("recv", "up", 0, 9)]])
