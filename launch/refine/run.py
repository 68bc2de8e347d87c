"""The command `deepnarrow refine`: the paper's recipe for web text (arXiv 2401.02954, section 2.1)."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launch.refine.plan import plan
from launch.refine.settings import DOCUMENTS, RECIPE, REMOVED, REPORT, TEXT, Executor, Plan, write_json
from model.problems import BadInput
from train.data.workers import WorkerDied

if TYPE_CHECKING:
    from launch.refine.stages import Stage

_SUBMITTED = "submitted.json"


def run(overrides: Sequence[str]) -> int:
    """Run what has not been done yet of a refinement, and print its report; return the exit code.

    With Slurm the stages are submitted as job arrays, each waiting for the one before, and the command returns.

    Args:
        overrides: the overrides ``refine.…`` and those of the corpus.

    Returns:
        0 where the refinement is done or submitted, 1 where it leaves no document.

    Raises:
        BadInput: the refinement cannot work, or cannot go on; what is done stays.
    """
    refinement = plan(overrides)
    said = f"refine.out={refinement.folder}"
    from filelock import FileLock, Timeout

    from launch.refine.report import read_report

    try:
        refinement.work.mkdir(parents=True, exist_ok=True)
        with FileLock(refinement.work / "lock", timeout=0):
            if (report := read_report(refinement.folder)) is None:
                write_json(refinement.work / RECIPE, refinement.recipe())
                if refinement.settings.executor is Executor.slurm:
                    return _submit(refinement)
                _run_stages(refinement)
                report = read_report(refinement.folder)
    except Timeout as error:
        raise BadInput([f"{said}: another process refines into it; the same command would work once that "
                        "has ended, and does nothing twice"]) from error  # fmt: skip
    except OSError as error:
        raise BadInput([f"{said}: cannot be written ({error}); what is done stays, and the same command goes on once "
                        "that is mended"]) from error  # fmt: skip
    assert report is not None
    print((refinement.folder / TEXT).read_text("utf-8"), end="")
    print(f"{refinement.folder}: {DOCUMENTS}/, {REPORT}, {TEXT}, {REMOVED} with samples of what went")
    if not report["shares"]:
        print(f"{said}: no document is left; other filters, or another corpus, would work", file=sys.stderr)
        return 1
    return 0


def _run_stages(refinement: Plan) -> None:
    from launch.refine.report import unusable
    from launch.refine.stages import executors, stages

    all_of = stages(refinement)
    for number, (stage, executor) in enumerate(zip(all_of, executors(refinement, all_of), strict=True), 1):
        left = len(executor.get_incomplete_ranks(skip_completed=True))
        _say(f"{number} of {len(all_of)}, {stage.said}: {left} of {stage.tasks} tasks" + ("" if left else ", done"))
        if left:
            _run_stage(refinement, stage, executor)
        if number == 1 and (problems := unusable(refinement)):  # the first stage has read all
            raise BadInput(problems)


def _run_stage(refinement: Plan, stage: "Stage", executor: Any) -> None:
    logs = refinement.work / "stages" / stage.name / "logs"
    try:
        executor.run()
    except WorkerDied as error:
        workers = refinement.settings.workers
        raise BadInput([f"refine.workers={workers or 'null'}: a worker was killed ({stage.said}); where memory is "
                        "short, fewer would work, and the same command goes on"]) from error  # fmt: skip
    except (BadInput, OSError):
        raise
    except Exception as error:
        raise RuntimeError(f"{stage.said}: a task has failed, {type(error).__name__}: {error}; its log is in {logs}"
                           ) from error  # fmt: skip
    if failed := executor.get_incomplete_ranks(skip_completed=True):
        raise RuntimeError(f"{stage.said}: {len(failed)} tasks have failed; their logs are in {logs}")


def _submit(refinement: Plan) -> int:
    """Submit what has not been done yet to Slurm, unless that has been submitted and is still to come."""
    from launch.refine.report import unusable
    from launch.refine.stages import executors, stages

    all_of = stages(refinement)
    made: list[Any] = executors(refinement, all_of)
    complete = [not executor.get_incomplete_ranks(skip_completed=True) for executor in made]
    if complete[0] and (problems := unusable(refinement)):
        raise BadInput(problems)
    done = sum(complete)
    said = f"{done} of {len(all_of)} stages are done"
    submitted = refinement.work / _SUBMITTED
    if submitted.exists():
        job = json.loads(submitted.read_text("utf-8"))["job"]
        asked = subprocess.run(["squeue", "-h", "-o", "%T %r", "-j", job], capture_output=True, text=True)
        if state := asked.stdout.strip().splitlines()[:1]:
            _say(f"{said}; job {job}, which writes the report, is still to come ({state[0]}): the same command says so "
                 f"again, and after scancel {job} submits what is not done")  # fmt: skip
            return 0
    try:
        made[-1].run()
    except subprocess.CalledProcessError as error:
        raise BadInput([f"refine.slurm={refinement.settings.slurm}: {error.cmd[0]} refuses a job, for the reason that "
                        "stands above; another partition, time or account would work"]) from error  # fmt: skip
    write_json(submitted, {"job": str(made[-1].job_id)})
    _say(
        f"{said}, the others are submitted; job {made[-1].job_id} writes the report, which the same command then prints"
    )
    return 0


def _say(text: str) -> None:
    print(f"refine: {text}", file=sys.stderr, flush=True)
