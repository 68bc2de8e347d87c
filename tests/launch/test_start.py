"""The estimate of a large run's start."""

from collections.abc import Callable

import pytest

from conf.compose import compose_overrides
from launch.bench import start
from parallel.groups import make_ranks
from parallel.layout import Layout
from parallel.schedules import Placement


@pytest.mark.parametrize("layout", [Layout(16, 4, 8), Layout(32, 16, 8), Layout(1, 2, 1), Layout(2, 1, 4)], ids=str)
def test_calls_that_split_the_world_are_those_that_a_rank_makes(layout, monkeypatch):
    from parallel import groups

    calls: list[Callable[..., None]] = []
    monkeypatch.setattr(groups.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(groups.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(groups.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(groups.dist, "get_world_size", lambda: layout.world_size)
    monkeypatch.setattr(groups.dist, "split_group", lambda **how: calls.append(how))
    make_ranks(layout, Placement(layout.pp, 1, False), 1)
    assert start.split_calls(layout) == len(calls) <= 64


def test_an_estimate_adds_its_parts_up():
    one = {"import_seconds": 5.0, "import_files": 2500, "preflight_seconds": 0.2, "shared_bytes": 8000}
    one |= {"requests": 20, "seconds_per_request": 2e-5, "parameters_per_second": 1e8}
    config = compose_overrides(start.DEFAULTS).config
    few, many = (start.estimate(config, one, **run) for run in start.RUNS)
    assert few["total"] == pytest.approx(sum(few["seconds"].values()))
    assert few["seconds"]["imports"] == pytest.approx(5 + 64 * 2500 / 20_000)
    assert few["seconds"]["weights"] > many["seconds"]["weights"]  # a rank draws its stages whole
    assert many["seconds"]["meeting"] == 8 * few["seconds"]["meeting"]
