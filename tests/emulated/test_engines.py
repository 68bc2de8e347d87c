"""Whole engines by NCCL's rules, on 8 ranks: two steps, between them an evaluation, scores, a checkpoint's copy and
decoding.

Tensor-parallel collectives, ZeRO's reductions and gathers, messages and the step's one sum over the world share
devices, and end whatever a host has to wait for. Before each message was asked for at a planned place, every job here
hung in its first step: by the first messages (finding 1), and where all was connected by a device-wide wait of all
ranks at their first kernel, or of one rank at 84 (dp2 x pp4, 1f1b) to 3,742 (pp4 x tp2, zbv) of the notes of two steps
(finding 2).
"""

import pytest

from tests.emulated.engines import JOBS, PHASES
from tests.emulated.explain import why
from tests.emulated.nccl import Play, Rules, waits_that_hang
from tests.emulated.notes import numbered
from tests.ranks import run_ranks

every_job = pytest.mark.parametrize("job", JOBS, ids=lambda job: f"dp{job.dp}-pp{job.pp}-tp{job.tp}-{job.schedule}")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each rank of each job has said."""
    shares = run_ranks("tests.emulated.engines", 2, tmp_path_factory.mktemp("engines"))
    return {
        job: [ranks[rank] for rank in range(job.layout.world_size)]
        for job, *by_process in zip(JOBS, *shares, strict=True)
        if (ranks := {rank: one for own in by_process for rank, one in own.items()})
    }


@pytest.fixture
def notes(said, job):
    """Of each rank of a job."""
    return [one["notes"] for one in said[job]]


def of_phase(one, phase):
    """A rank's notes of one of its phases."""
    begins = [*one["begins"].values(), len(one["notes"])]
    index = PHASES.index(phase)
    return one["notes"][begins[index] : begins[index + 1]]


@every_job
@pytest.mark.parametrize("queues", [None, 1, 2, 8])
@pytest.mark.parametrize("eager", [False, True])
def test_two_steps_end_with_nothing_connected_before(notes, queues, eager):
    """First use blocks hosts, and streams share hardware queues (findings 1 and 4)."""
    rules = Rules(queues=queues, eager=eager)
    play = Play(numbered(notes, eager), rules)
    assert play.ended, why(play)


@every_job
def test_two_steps_end_though_hosts_wait_for_their_devices(said, job, notes):
    """All at their first kernel of a step, as for kernels that are timed; all before every call; one at each note."""
    for phase in ("first step", "second step"):
        starts = [(one["notes"], one["begins"][phase]) for one in said[job]]
        kernels = [next(at for at in range(begin, len(own)) if own[at][0] == "compute") for own, begin in starts]
        play = Play(numbered(notes), Rules(), {rank: {at} for rank, at in enumerate(kernels)})
        assert play.ended, why(play)
    everywhere = Play(numbered(notes), Rules(), everywhere=True)
    assert everywhere.ended, why(everywhere)
    assert not list(waits_that_hang(numbered(notes), Rules()))


@every_job
def test_a_host_waits_once_in_a_step(said, job):
    """For the loss and the norm, at its end; what is launched before is not held up."""
    for one in said[job]:
        assert not [note for note in of_phase(one, "save") if note[0] not in ("compute", "wait")]
        for phase in ("first step", "second step"):
            own = of_phase(one, phase)
            assert [note[0] for note in own].count("read") == 1
            assert {note[0] for note in own[[note[0] for note in own].index("read") :]} <= {"read", "compute"}


@every_job
def test_what_is_played_is_a_whole_step(said, job):
    """Every rank computes, all messages and the collectives of each kind of parallelism are there."""
    m = job.micro_batches
    crossings = job.placement.num_stages - 1 - (job.schedule == "zbv")
    steps = [of_phase(one, "second step") for one in said[job]]
    sent = sum(note[0] == "send" for own in steps for note in own)
    assert sent == 2 * m * crossings * job.dp * job.tp
    for own in steps:
        collectives = [note for note in own if note[0] == "collective"]
        sizes = {len(note[2]) for note in collectives}
        assert sizes >= {size for size in (job.dp, job.tp, 8) if size > 1}
        if job.dp > 1:
            assert {note[4].split()[0] for note in collectives if len(note[2]) == job.dp and note[3]} >= {
                *["reduce_scatter_tensor", "all_gather_into_tensor"]
            }


@every_job
def test_scores_are_messages_forward_and_one_sum_over_all_ranks(said, job):
    crossings = job.placement.num_stages - 1 - (job.schedule == "zbv")
    own = [of_phase(one, "scores") for one in said[job]]
    sent = sum(note[0] == "send" for notes in own for note in notes)
    assert sent and sent % (crossings * job.tp) == 0
    for notes in own:
        members = [len(note[2]) for note in notes if note[0] == "collective"]
        assert [number for number in members if number not in (job.dp, job.tp)] == [8]
