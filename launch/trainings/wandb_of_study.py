"""The results of a study as a run of their own in Weights & Biases."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.train_settings import WandbConfig
from train.version import code_version
from train.wandb_run import start_wandb, wandb_id, wandb_mode

Table = tuple[Sequence[str], Sequence[Sequence[Any]]]
"""The names of the columns, and the rows."""


def wandb_of_study(
    settings: WandbConfig,
    folder: Path,
    config: Mapping[str, Any],
    tables: Mapping[str, Table],
    pictures: Sequence[Path],
    summary: Mapping[str, Any],
) -> None:
    """Log the results of a study, where W&B is not disabled; the same folder is the same run again.

    Args:
        settings: the section wandb.
        folder: of the study; its name is the run's.
        config: what the study was asked for; the version of the code is added.
        tables: by name.
        pictures: files, logged by their names without the ending.
        summary: figures of the whole.
    """
    run, _, _ = start_wandb(
        wandb_mode(settings),
        wandb_id(folder),
        project=settings.project,
        entity=settings.entity,
        tags=settings.tags,
        name=folder.name,
        dir=folder,
        config={**config, "code": code_version()},
    )
    if run is None:
        return
    import wandb

    logged = {name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])
              for name, (columns, rows) in tables.items()}  # fmt: skip
    run.log({**logged, **{path.stem: wandb.Image(str(path)) for path in pictures}})
    run.summary.update(dict(summary))
    run.finish()
