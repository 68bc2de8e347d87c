"""The trainings of a study's sections: what starts them, and what becomes of a section whose trainings fail."""

from contextlib import contextmanager

import pytest

from launch.study.plan import Original, plan
from launch.study.settings import Section
from launch.study.training import KeptStarts, SectionTrainings
from launch.supervise import PASSED_ON
from model.regroup import Method
from tests.launch.study.small import small_study


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
