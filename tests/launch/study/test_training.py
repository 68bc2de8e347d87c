"""The trainings of a study's sections: what starts them, and what becomes of a section whose trainings fail."""

from contextlib import contextmanager

import pytest

from launch.study.plan import Original, plan
from launch.study.settings import Section
from launch.study.training import KeptStarts, SectionTrainings
from launch.supervise import PASSED_ON
from model.regroup import Method
from tests.launch.study.small import StandIn, small_study


@pytest.fixture(scope="module")
def command(overrides, tmp_path_factory):
    return small_study(overrides, tmp_path_factory.mktemp("study") / "kept")


def sections(command, starts, *more):
    """The trainings of two sections, which need the same uptraining."""
    found = plan([*command, "study.seeds=[1]", *more])
    runs = [found.uptraining(Original(1), 1, Method.mean)]
    return SectionTrainings(found, {Section.decode: runs, Section.heads: runs}, lambda text: None, starts)


@pytest.mark.parametrize("code", [0, *(128 + number for number in PASSED_ON)])
def test_whatever_signal_stops_a_training_stops_the_study(code, command, monkeypatch):
    calls = []
    monkeypatch.setattr("launch.study.training.train_all", lambda trainings, **how: calls.append(trainings) or code)
    trainings = sections(command, None)
    assert trainings.run() == code and trainings.failed == {} and len(calls) == 1


def test_a_training_that_has_failed_is_not_trained_again_for_another_section(command, tmp_path):
    starts = StandIn(lambda run_dir, step: None)
    trainings = sections(command, starts, f"study.dir={tmp_path}")
    assert trainings.run() is None
    assert starts.folders == ["pretrained"]
    assert trainings.failed == dict.fromkeys([Section.decode, Section.heads], "a training ended with exit code 1")


def test_a_section_that_needs_nothing_that_failed_is_trained(command, tmp_path):
    """Of two pretrainings that are begun together one fails, and the other is what one section needs."""
    starts = StandIn(lambda run_dir, step: None if "smaller" in str(run_dir) else 3.0)
    found = plan([*command, f"study.dir={tmp_path}", "study.seeds=[1]"])
    both = [found.uptraining(Original(1, smaller), 4, None) for smaller in (True, False)]
    wanted = {Section.smaller: both, Section.decode: both[1:], Section.heads: both[:1]}
    trainings = SectionTrainings(found, wanted, lambda text: None, starts)
    assert trainings.run() is None
    assert starts.folders == ["pretrained", "pretrained"]
    why = "a training ended with exit code 1"
    assert trainings.failed.pop(Section.smaller) == trainings.failed.pop(Section.heads) == why
    # What stands in for a pretraining leaves no weights to go on with.
    assert list(trainings.failed) == [Section.decode] and "no weights are there" in trainings.failed[Section.decode]


def test_what_starts_trainings_is_kept_from_one_call_to_the_next(monkeypatch):
    made, closed = [], []

    @contextmanager
    def starter(ranks, at_once):
        made.append((ranks, at_once))
        yield made[-1]
        closed.append((ranks, at_once))

    monkeypatch.setattr("launch.study.training.starter", starter)
    kept = KeptStarts()
    for ranks in (1, 1, 2):
        with kept(ranks, None) as found:
            assert found == (ranks, None)
    assert made == [(1, None), (2, None)] and closed == [(1, None)]
    kept.close()
    assert closed == made
