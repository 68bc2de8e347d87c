"""The stages of a refinement in the paper's order, each a pipeline of datatrove's blocks for one of its executors."""

import contextlib
import copy
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
)
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter

from launch.refine.languages import WORDS
from launch.refine.report import Report
from launch.refine.settings import DOCUMENTS, Dedup, Executor, Plan, Quality, Repetition
from launch.refine.steps import (
    Clusters,
    For,
    Kept,
    Language,
    Length,
    Lines,
    Originals,
    Read,
    Removed,
    Signature,
    cluster_key,
    copies_key,
    text_key,
    text_of,
)
from train.data.workers import default_workers, work_through

_ENGLISH = ["en"]
_NOWHERE = open(os.devnull, "w")  # noqa: SIM115 (loguru keeps it)
_FINDERS = 64


@dataclass(frozen=True)
class Stage:
    """A stage: what it does in words, the name of its folder, its blocks, and into how many tasks it is cut."""

    said: str
    name: str
    steps: list[PipelineStep]
    tasks: int


def stages(plan: Plan) -> list[Stage]:
    """Make the stages: deduplication over all documents first, then filters, then the report.

    Deduplication reads the corpus once to sign exact copies and once to sign near copies of what these leave; the
    filters read it a third time, and see one copy of each document.
    """
    made, tasks, settings = [], len(plan.tasks), plan.settings
    exact = ExactDedupConfig(content_getter=text_of)
    minhash = MinhashConfig(
        n_grams=settings.minhash.n_grams,
        num_buckets=settings.minhash.buckets,
        hashes_per_bucket=settings.minhash.hashes_per_bucket,
        seed=settings.seed,
    )

    def folder(*names: str) -> str:
        return str(plan.work.joinpath(*names))

    def read() -> Read:
        return Read(plan.tasks, plan.data, plan.work / "read")

    if settings.dedup is not Dedup.none:
        finders = min(_FINDERS, -(-tasks // 16))
        made += [
            Stage("signing texts", "exact-signatures",
                  [read(), ExactDedupSignature(folder("exact", "signatures"), exact, finders)], tasks),
            Stage("finding equal texts", "exact-duplicates",
                  [ExactFindDedups(folder("exact", "signatures"), folder("exact", "duplicates"), exact,
                                   save_cluster_size=True)], finders),
        ]  # fmt: skip
    if settings.dedup is Dedup.minhash:
        signatures, pairs, clusters = (folder("minhash", name) for name in ("signatures", "pairs", "clusters"))
        unequal = ExactDedupFilter(folder("exact", "duplicates"), exact)
        made += [
            Stage("signing n-grams", "minhash-signatures", [read(), unequal, Signature(signatures, minhash)], tasks),
            Stage("finding equal signatures", "minhash-pairs",
                  [MinhashDedupBuckets(signatures, pairs, config=minhash)], minhash.num_buckets),
            Stage("clustering", "minhash-clusters",
                  [MinhashDedupCluster(pairs, clusters, minhash, save_cluster_id=True)], 1),
        ]  # fmt: skip
    made.append(Stage("filtering", "filters", [read(), *_once(plan, exact), *_filters(plan), *_written(plan)], tasks))
    made.append(Stage("reporting", "report", [Report(plan, removing(plan))], 1))
    return made


def removing(plan: Plan) -> list[str]:
    """Name the steps that remove documents, in their order."""
    settings, dedup = plan.settings, plan.settings.dedup
    steps = {
        "exact": dedup is not Dedup.none,
        "minhash": dedup is Dedup.minhash,
        "length": settings.min_chars is not None or settings.max_chars is not None,
        "language": bool(settings.languages),
        "repetition": settings.repetition is not Repetition.none,
        "quality": settings.quality is not Quality.none,
    }
    return [name for name, wanted in steps.items() if wanted]


def _removed(plan: Plan, step: str, key: Any = None) -> Removed:
    return Removed(plan.work / "removed", step, plan.settings.samples, plan.settings.seed, key)


def _once(plan: Plan, exact: ExactDedupConfig) -> list[PipelineStep]:
    """The blocks that let one copy of each document through."""
    work, dedup = plan.work, plan.settings.dedup
    made: list[PipelineStep] = []
    if dedup is not Dedup.none:
        removed = _removed(plan, "exact", text_key)
        made += [
            ExactDedupFilter(str(work / "exact" / "duplicates"), exact, exclusion_writer=removed),
            Originals(work / "originals" / "exact", copies_key),
        ]
    if dedup is Dedup.minhash:
        clusters = work / "minhash" / "clusters"
        made += [
            Clusters(clusters),
            MinhashDedupFilter(str(clusters), exclusion_writer=_removed(plan, "minhash", cluster_key)),
            Originals(work / "originals" / "minhash", cluster_key),
        ]
    return made


def _filters(plan: Plan) -> list[PipelineStep]:
    settings = plan.settings
    spared, wanted = settings.unfiltered, removing(plan)
    made: list[PipelineStep] = []
    if "length" in wanted:
        made.append(For(Length(settings.min_chars, settings.max_chars, _removed(plan, "length")), spared))
    if "language" in wanted:
        language = Language(settings.languages, settings.language_score, _removed(plan, "language"))
        made.append(For(language, spared))
    if "repetition" in wanted:
        repetition = GopherRepetitionFilter(language=WORDS, exclusion_writer=_removed(plan, "repetition"))
        made.append(For(repetition, spared))
    if "quality" in wanted:
        kind = GopherQualityFilter if settings.quality is Quality.gopher else FineWebQualityFilter
        made.append(For(kind(language=WORDS, exclusion_writer=_removed(plan, "quality")), spared, _ENGLISH))
    return made


def _written(plan: Plan) -> list[PipelineStep]:
    work = plan.work
    writer = Lines(str(work / DOCUMENTS), "${source}/${rank}.jsonl", compression="zstd")
    return [writer, Kept(work / "kept")]


class Local(LocalPipelineExecutor):
    """datatrove's local executor in the worker processes of preparation: one that is killed is an error.

    In a pool of `multiprocessing`, its task would be waited for without end.
    """

    def run(self) -> None:
        """Run the tasks that are not done.

        Raises:
            WorkerDied: a worker was killed.
            Exception: what a task raises.
        """
        left, lock = iter(self.get_incomplete_ranks()), threading.Lock()

        def next_call() -> tuple[Any, ...] | None:
            with lock:
                rank = next(left, None)
            return None if rank is None else (_run_task, rank)

        work_through((_itself, (self,)), self.workers, next_call, lambda _: None)


def _itself(executor: Local) -> Local:
    return executor


def _run_task(executor: Local, rank: int) -> None:
    # A copy, since its steps count. Its log is in the stage's folder, and need not be on the screen as well.
    with contextlib.redirect_stderr(_NOWHERE):
        copy.deepcopy(executor)._run_for_rank(rank)


def executors(plan: Plan, stages: Sequence[Stage]) -> list[PipelineExecutor]:
    """Make the executor of each stage; with Slurm each waits for the one before."""
    made: list[Any] = []
    for stage in stages:
        settings, logs = plan.settings, str(plan.work / "stages" / stage.name)
        workers = settings.workers or -1
        if settings.executor is Executor.slurm:
            before = made[-1] if made else None
            made.append(
                SlurmPipelineExecutor(
                    stage.steps,
                    stage.tasks,
                    workers=workers,
                    depends=before,
                    logging_dir=logs,
                    job_name=f"refine-{stage.name}",
                    **settings.slurm,
                )
            )
        elif settings.executor is Executor.ray:
            from datatrove.executor import RayPipelineExecutor

            made.append(RayPipelineExecutor(stage.steps, stage.tasks, workers, logging_dir=logs, **settings.ray))
        else:
            workers = min(settings.workers or default_workers(), stage.tasks)
            made.append(Local(stage.steps, stage.tasks, workers, logging_dir=logs))
    return made
