"""A run as a job of Hydra's, from a configuration that is composed already."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from hydra._internal.callbacks import Callbacks
from hydra.core.utils import run_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, open_dict, read_write

from conf.compose import Composition


def run_as_job(composition: Composition, run_dir: Path, task: Callable[[], None]) -> None:
    """Run a task with Hydra's files in the run folder, its logs, and what ``hydra.job`` says of the environment.

    `hydra.main` would do the same after composing once more, and would look ``${now:...}`` up again in `hydra.run.dir`.
    The working directory stays, whatever ``hydra.job.chdir`` says: paths in the configuration are relative to where the
    run was started.

    Args:
        composition: of the run.
        run_dir: where it is kept.
        task: the run itself; what it raises passes.
    """
    node = composition.node
    with read_write(node), open_dict(node):
        node.hydra.run.dir = str(run_dir)
        node.hydra.job.chdir = False
        node.hydra.mode = RunMode.RUN
    callbacks = Callbacks(node)
    callbacks.on_run_start(config=node, config_name=node.hydra.job.config_name)

    def of_hydra(config: DictConfig) -> None:
        task()

    # A loader is for those who compose again.
    context = HydraContext(config_loader=cast(Any, None), callbacks=callbacks)
    ended = run_job(of_hydra, node, job_dir_key="hydra.run.dir", job_subdir_key=None, hydra_context=context)
    callbacks.on_run_end(config=node, config_name=node.hydra.job.config_name, job_return=ended)
    _ = ended.return_value  # or what the task raised
