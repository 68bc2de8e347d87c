"""The trainings of a study's sections: what starts them, and what becomes of a section whose trainings fail."""

from contextlib import contextmanager

from launch.study.training import KeptStarts


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
