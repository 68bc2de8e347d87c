"""What is found wrong before a process is started."""

import pytest

from conf.validate import Machine
from model.problems import BadInput
from train.events import RESTART
from train.preflight import preflight


def test_an_environment_in_which_gpus_would_hang_is_refused_with_all_else_that_is_wrong(
    overrides, monkeypatch, tmp_path
):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    asked = [*overrides, "parallel.pp=2", f"hydra.run.dir={tmp_path / 'run'}"]
    with pytest.raises(BadInput) as caught:
        preflight([*asked, "train.log_every=0"], machine=Machine(gpus=8))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "train.log_every=0",
        "CUDA_DEVICE_MAX_CONNECTIONS=1",
    ]
    assert preflight(asked, machine=Machine(gpus=0)).layout.pp == 2  # no GPU, no queue


def test_tasks_and_sets_that_are_not_there_are_refused_and_end_no_run_that_goes_on(overrides, monkeypatch, tmp_path):
    asked = [*overrides, f"hydra.run.dir={tmp_path / 'run'}", f"eval.tasks=[{tmp_path}/gone.jsonl]"]
    with pytest.raises(BadInput) as caught:
        preflight([*asked, f"eval.sets={{a: {{path: {tmp_path}/nothing}}}}"], machine=Machine(gpus=0))
    sets, tasks = caught.value.problems
    assert sets.startswith(f"eval.sets.a.path={tmp_path}/nothing: no such file or folder;")
    assert tasks.startswith(f"eval.tasks={tmp_path}/gone.jsonl: no such task;")
    monkeypatch.setenv(RESTART, "1")  # the command has started a run again, whose task is gone meanwhile
    prepared = preflight(asked, machine=Machine(gpus=0))
    assert prepared.warnings[0] == tasks and prepared.sets.by_name == {}


@pytest.mark.parametrize("asked", ["continuation", "{path: continuation}"])
def test_a_task_of_held_out_documents_that_there_are_none_of_is_refused(asked, overrides, monkeypatch, tmp_path):
    monkeypatch.setattr("train.evaluate.continuation.problems", lambda data, config: ["continuation: too few"])
    given = [*overrides, f"hydra.run.dir={tmp_path / 'run'}", f"eval.tasks=[{asked}]"]
    with pytest.raises(BadInput, match="too few"):
        preflight(given, machine=Machine(gpus=0))
    monkeypatch.setenv(RESTART, "1")
    assert "continuation: too few" in preflight(given, machine=Machine(gpus=0)).warnings
