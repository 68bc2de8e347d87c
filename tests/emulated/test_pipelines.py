"""Every schedule on 2, 4 and 8 ranks by NCCL's rules: no step waits for itself, whatever a host has to wait for.

A pipeline that posts receives before others can send them hangs under NCCL where it does not under Gloo. Before each
message was asked for at a planned place (`parallel.simulation.programs`), on 2, 4 and 8 ranks with 2p micro-batches

- every schedule hung at its first training step, and all but 1f1b and zero_bubble v=1 at a first evaluation, as two
  ranks asked each other first (finding 1);
- with the links connected beforehand, one device-wide wait never ended at 2 (1f1b, 2 ranks) to 785 (zbv, 8 ranks) of
  a training step's notes, and at 7 to 718 of an evaluation's where that hung (finding 2);
- with one hardware queue zero_bubble hung at v=2 (2 and 8 ranks) and v=3, with two at v=2 on 8 ranks and v=3 on 4 and
  8 (finding 4).
"""

from dataclasses import replace
from itertools import product
from unittest import mock

import pytest

from parallel import pipeline
from parallel.schedules import Schedule, batch_problems
from tests.emulated.explain import why
from tests.emulated.nccl import Play, Rules, waits_at_a_pass_that_hang, waits_that_hang
from tests.emulated.notes import numbered
from tests.emulated.pipelines import recorded

SCHEDULES = [("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero_bubble", 1), ("zero_bubble", 2)]
SCHEDULES += [("zero_bubble", 3), ("zbv", 2), ("dualpipev", 2)]
CASES = [(name, v, p) for (name, v), p in product(SCHEDULES, (2, 4, 8))]
every_pipeline = pytest.mark.parametrize(("name", "virtual", "p"), CASES)


def counts(name, p):
    """Micro-batches of a step: one, numbers that the ranks do and do not divide, as far as a schedule takes them."""
    return [m for m in (1, p, p + 1, 2 * p, 2 * p + 3) if not batch_problems(Schedule[name], p, m, 1)]


def sessions(name, p):
    """A training step alone, an evaluation alone, and both after each other with changing numbers of micro-batches."""
    few, *_, many = counts(name, p)
    for m in counts(name, p):
        yield ((True, m),)
    for m in (p + 1, 2 * p):
        yield ((False, m),)
    yield (True, few), (False, p), (True, many), (False, 1), (True, few)


@every_pipeline
@pytest.mark.parametrize("eager", [False, True])
def test_a_step_ends_though_every_host_waits_for_its_device_before_every_call(name, virtual, p, eager):
    """As with CUDA_LAUNCH_BLOCKING: no other wait for a device, and no number of queues, holds up more (see `nccl`)."""
    for steps in sessions(name, p):
        play = Play(numbered(recorded(name, p, virtual, steps), eager), Rules(eager=eager), everywhere=True)
        assert play.ended, f"{steps}\n{why(play)}"


@every_pipeline
def test_a_step_ends_with_any_number_of_hardware_queues(name, virtual, p):
    """Streams that share a queue hold each other up; nothing is connected before its first use."""
    for steps in sessions(name, p):
        programs = numbered(recorded(name, p, virtual, steps))
        for queues in (None, 1, 2, 4, 8):
            play = Play(programs, Rules(queues=queues))
            assert play.ended, f"{steps} {queues}\n{why(play)}"


@every_pipeline
@pytest.mark.parametrize("training", [True, False])
def test_a_device_wide_wait_ends_wherever_a_rank_meets_it(name, virtual, p, training):
    """One rank's at each of its notes, and all ranks' at the first kernel of their k-th pass, connected or not."""
    m = next(m for m in counts(name, p) if m > p)
    programs = numbered(recorded(name, p, virtual, ((training, m),)))
    for first_use in (True, False):
        assert not list(waits_that_hang(programs, Rules(first_use)))
    assert not list(waits_at_a_pass_that_hang(programs, Rules()))


@every_pipeline
def test_a_message_that_is_asked_for_a_pass_earlier_is_seen_to_hang(name, virtual, p):
    """The player would tell: with every receive a pass before its place, some wait of some rank never ends."""
    planned = pipeline.programs

    def a_pass_early(orders, placement):
        return [
            replace(one, receives=[[*one.receives[0], *one.receives[1]], *one.receives[2:], []])
            for one in planned(orders, placement)
        ]

    with mock.patch.object(pipeline, "programs", a_pass_early):
        programs = numbered(recorded.__wrapped__(name, p, virtual, ((True, 2 * p),)))
    hung = Play(programs, Rules(), everywhere=True)
    assert not hung.ended and "around" in why(hung)
    assert not Play(programs, Rules()).ended or list(waits_that_hang(programs, Rules()))


@every_pipeline
def test_what_is_played_is_a_whole_step(name, virtual, p):
    """Every message and every pass of each stage is there, once for each micro-batch."""
    m = counts(name, p)[-1]
    notes = recorded(name, p, virtual, ((True, m),))
    said = [note for own in notes for note in own]
    crossings = virtual * p - 1 - (p > 1) * (virtual - 1) * (name in ("zbv", "dualpipev"))
    for kind in ("send", "recv"):
        assert sum(note[0] == kind for note in said) == 2 * m * crossings
    passes = [note[1] for note in said if note[0] == "compute"]
    for what, stage in product("FB", range(virtual * p)):
        assert passes.count(f"{what} stage {stage}") == m
    assert any("W" in one for one in passes) == (name not in ("1f1b", "interleaved"))
