"""Runs that are kept going though one thing after another befalls them: a selection of `tests.faults.injector`'s."""

import json
import shutil
from pathlib import Path

import pytest

from conf.launch_settings import LaunchConfig
from tests.faults import injector_run
from tests.train.checkpoint import runs

STACK_OF = {"sleep": "held_up.py", "spin": "held_up.py", "stop": "the process does not answer"}
"""What stands in the stacks of a rank that holds the others up."""
KILLED, STALLED = "was ended by SIGKILL (as a system does that is out of memory)", "held up the others"


def fault(do, where, step, rank, cause, **more):
    return {"do": do, "where": where, "step": step, "rank": rank, **more}, cause


CHAINS = {  # layout, steps, and what happens in them
    "forty steps with a kill every eight": (
        "pp2",
        40,
        [
            fault("kill", "forward", 8, 1, KILLED),
            fault("kill", "forward", 12, 0, KILLED, before="damage"),
            fault("kill", "forward", 16, 0, KILLED),
            fault("sleep", "backward", 20, 1, STALLED),
            fault("kill", "forward", 24, 1, KILLED),
            fault("kill", "forward", 32, 0, KILLED),
        ],
    ),
    "replicas": (
        "dp2",
        runs.STEPS,
        [
            fault("cut", "batch", 4, 1, "failed (ChangedTokens: {file}: ends after "),
            fault("raise", "reduce", 9, 0, "failed (RuntimeError: as the test asks)"),
            fault("stop", "update", 11, 1, "was stopped (SIGSTOP)"),
        ],
    ),
    "a rank that holds the interpreter": ("tp2", runs.STEPS, [fault("spin", "forward", 4, 1, STALLED)]),
}


@pytest.mark.launch
@pytest.mark.parametrize("chain", CHAINS)
def test_faults_are_noticed_named_and_leave_no_trace_in_the_weights(chain, overrides, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("launch.restarts.LONGEST_WAIT", 0.0)
    layout, steps, planted = CHAINS[chain]
    given, folder = [*overrides, f"train.max_steps={steps}"], tmp_path / "run"
    alone = injector_run.undisturbed_in(tmp_path, given)(layout)
    own = Path(shutil.copytree(dict(word.split("=", 1) for word in overrides)["data.cache_dir"], tmp_path / "cache"))
    file = injector_run.tokens_of(alone, own)
    faults = [
        {**plant, "once": str(tmp_path / f"{number}.done"), "run_dir": str(folder), "file": str(file)}
        for number, (plant, _) in enumerate(planted)
    ]
    settings = LaunchConfig(10, injector_run.STALL)
    code, left = injector_run.run([*given, f"data.cache_dir={own}"], layout, folder, faults, settings)
    said = capfd.readouterr().err
    assert code == 0 and not left, said
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    failed = [event for event in events if event["event"] == "failed"]
    for event, (plant, cause) in zip(failed, planted, strict=True):
        assert event["cause"].startswith(cause.format(file=file)), said
        if plant["do"] == "cut":  # batches are read ahead, by both ranks from one file
            assert 0 <= event["step"] - plant["step"] <= 4
        else:
            assert (event["step"], event["rank"]) == (plant["step"], plant["rank"])
    assert [event["restarts"] for event in events if event["event"] == "recovered"] == [*range(1, len(planted) + 1)]
    assert runs.digests(runs.saved(folder, steps)) == runs.digests(runs.saved(alone, steps))
    assert runs.curve(folder) == runs.curve(alone)
    told = [record for record in runs.metrics(folder) if "restarts" in record]
    assert told and told[-1]["restarts"] <= len(planted)  # in the first step after it; a later one takes some back
    for plant, _ in planted:
        if plant.get("before"):
            assert "is damaged (" in "".join(log.read_text() for log in tmp_path.glob("run-start-*/rank0.log"))
        if plant["do"] in STACK_OF:
            assert f"the others wait for rank {plant['rank']} (process " in said
            (stacks,) = [path.read_text() for path in (folder / "stalls").glob(f"step-{plant['step']:08d}-*")]
            assert all(f"---- rank {rank}: " in stacks for rank in range(2))
            assert STACK_OF[plant["do"]] in stacks.partition(f"---- rank {plant['rank']}: ")[2]
