"""Everything that can be found wrong before a process is started or a device touched, and what a run needs from it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from conf.compose import compose_overrides
from conf.errors import BadInput
from conf.schema import Config
from conf.validate import Machine, validate, warnings
from parallel.layout import Layout
from train.data import corpus
from train.data.prepare import PreparedData, prepare


@dataclass(frozen=True)
class Ready:
    """A run that can start.

    Attributes:
        config: all settings, sound.
        layout: the rank grid.
        data: tokenised, memory-mapped.
        run_dir: where the run writes.
        warnings: what may not be what was meant, one sentence each.
    """

    config: Config
    layout: Layout
    data: PreparedData
    run_dir: Path
    warnings: list[str]


def preflight(
    overrides: Sequence[str],
    *,
    config_name: str = "config",
    config_dir: str | None = None,
    machine: Machine | None = None,
    writes: bool = True,
) -> Ready:
    """Compose, validate, and prepare the data, which runs once for all processes and is cached.

    Args:
        overrides: as on Hydra's command line.
        config_name: Hydra's ``--config-name``.
        config_dir: Hydra's ``--config-dir``.
        machine: to judge the layout by; None is the machine this runs on, as the launcher's environment describes it.
        writes: whether the run folder is this process's to write, and so to judge.

    Raises:
        BadInput: with every problem found.
    """
    composition = compose_overrides(overrides, config_name, config_dir)
    config = composition.config
    machine = machine or this_machine()
    layout, problems = validate(config, machine)
    problems = [*composition.problems, *problems, *corpus.check(config.data)]
    if writes:
        problems += _check_run_dir(composition.run_dir)
    if problems or layout is None:
        raise BadInput(problems)
    data = prepare(config.data, config.model.vocab_size, config.train.seq_len)
    return Ready(config, layout, data, composition.run_dir, warnings(config, layout, machine))


def this_machine() -> Machine:
    """GPUs here, and the processes that a launcher has started, by the environment it sets."""
    local = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    processes = os.environ.get("WORLD_SIZE")
    return Machine(
        gpus=torch.cuda.device_count(),
        local_processes=int(local) if local else None,
        processes=int(processes) if processes else None,
    )


def _check_run_dir(run_dir: Path) -> list[str]:
    """Whether the run folder is one or can be made; nothing is."""
    nearest = run_dir.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return []
    why = "no permission to write there" if nearest.is_dir() else "not a folder"
    return [f"hydra.run.dir={run_dir}: {nearest}: {why}; a folder that can be written would work"]
