"""Faults planted in runs that are kept going: a short selection of what `tests.faults.injector` injects."""

import json

import pytest

from conf.launch_settings import LaunchConfig
from tests.faults import injector
from tests.faults.injector import Fault
from tests.train.checkpoint import runs


@pytest.fixture(scope="module")
def undisturbed(overrides, tmp_path_factory):
    """The same on each layout, with nothing in the way."""
    made = {}

    def of(layout, *more):
        if (layout, more) not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            assert injector.run([*overrides, *more], layout, folder, [], LaunchConfig(0))[0] == 0
            made[layout, more] = folder
        return made[layout, more]

    return of


SELECTED = [
    Fault("pp2", 1, {"do": "sleep", "where": "backward", "step": 7}),
    Fault("dp2", 1, {"do": "stop", "where": "update", "step": 5}),
    Fault("tp2", 1, {"do": "spin", "where": "forward", "step": 4}),
    Fault("pp2", 0, {"do": "kill", "where": "forward", "step": 5, "before": "damage"}),
    Fault("dp2", 0, {"do": "raise", "where": "reduce", "step": 9}),
]


@pytest.mark.launch
@pytest.mark.parametrize("fault", SELECTED, ids=str)
def test_a_fault_is_noticed_named_and_leaves_no_trace_in_the_weights(fault, overrides, undisturbed, tmp_path, capfd):
    outcome = injector.inject(overrides, fault, tmp_path / "run", undisturbed(fault.layout))
    assert outcome.as_it_should(fault), f"{outcome}\n{capfd.readouterr().err}"
    if fault.plant["do"] in ("sleep", "stop", "spin"):
        said = capfd.readouterr().err
        assert f"the others wait for rank {fault.rank} (process " in said
        (stacks,) = (tmp_path / "run" / "stalls").iterdir()
        for rank in range(2):
            assert f"---- rank {rank}: " in stacks.read_text()
        planted = {"sleep": "held_up.py", "spin": "held_up.py", "stop": "the process does not answer"}
        assert planted[fault.plant["do"]] in stacks.read_text().partition(f"---- rank {fault.rank}: ")[2]


@pytest.mark.launch
def test_forty_steps_with_a_kill_every_eight_need_no_hand(overrides, undisturbed, tmp_path):
    longer = "train.max_steps=40"
    kills = [
        {"do": "kill", "where": "forward", "step": step, "rank": step // 8 % 2, "once": str(tmp_path / f"{step}.done")}
        for step in range(8, 40, 8)
    ]
    code, _ = injector.run([*overrides, longer], "pp2", tmp_path / "run", kills, LaunchConfig(10))
    assert code == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    failed = [event for event in events if event["event"] == "failed"]
    assert [(event["step"], event["rank"]) for event in failed] == [(8, 1), (16, 0), (24, 1), (32, 0)]
    assert [event["restarts"] for event in events if event["event"] == "recovered"] == [1, 2, 3, 4]
    alone = undisturbed("pp2", longer)
    assert runs.digests(runs.saved(tmp_path / "run", 40)) == runs.digests(runs.saved(alone, 40))
    assert runs.curve(tmp_path / "run") == runs.curve(alone)
    told = [record for record in runs.metrics(tmp_path / "run") if "restarts" in record]
    assert told and told[-1]["restarts"] <= 4  # each in the first step after it; a later one takes some of them back
