"""What a run logs to Weights & Biases, whose process and server may leave it at any time."""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.schema import Config, to_jsonable
from train.names import GROUPED, grouped, groups
from train.version import code_version
from train.wandb_run import start_wandb, wandb_id, wandb_mode

Say = Callable[[str, int], object]


class WandbLog:
    """The W&B run of a run folder.

    A run that goes on keeps its W&B run: records that this has already are not sent again.

    Args:
        config: all settings, logged with the run.
        run_dir: the run folder, in which W&B's files are.
        facts: what else identifies the run.
        say: says what W&B does not do.
        kept_in: the name of the file that has what W&B misses.

    Attributes:
        mode: online, offline or disabled.
    """

    def __init__(self, config: Config, run_dir: Path, facts: dict[str, Any], say: Say, kept_in: str):
        self._run_dir, self._say, self._kept_in = run_dir, say, kept_in
        self._id = wandb_id(run_dir)
        self._settings = {
            "project": config.wandb.project,
            "entity": config.wandb.entity,
            "tags": config.wandb.tags,
            "name": config.name,
            "dir": run_dir,
            "config": {**to_jsonable(asdict(config)), **facts, "code": code_version()},
        }
        self._start(wandb_mode(config.wandb))

    def log(self, record: dict[str, Any]) -> None:
        """Log a record of metrics.jsonl under the names of `train.names`."""
        if record["step"] <= self._logged:  # taken and logged before, then lost with the process
            return
        self._tell(lambda run: run.log(grouped(record), step=record["step"], commit=True))

    def picture(self, name: str, path: Path) -> None:
        """Log a picture, with the next record."""

        def tell(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(path))}, commit=False)

        self._tell(tell)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table, with the next record."""

        def tell(run: Any) -> None:
            import wandb

            made = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            run.log({GROUPED.get(name, name): made}, commit=False)

        self._tell(tell)

    def alert(self, title: str, text: str, level: str) -> None:
        """Send an alert."""
        self._tell(lambda run: run.alert(title, text, level=level))

    def deleted(self) -> Path | None:
        """Return the folder of W&B's files if it was deleted while they are written."""
        gone = self._run is not None and self._is_kept and not self._folder.exists()
        return self._folder if gone else None

    def start_again(self, records: Iterable[dict[str, Any]]) -> None:
        """Begin W&B's files anew, after they were deleted, with the records that they held."""
        self._tell(lambda run: run.finish())
        self._start("offline")
        for record in records:
            self.log(record)

    def finish(self, summary: dict[str, Any]) -> None:
        """Log the summary of the run, and end the W&B run."""
        self._tell(lambda run: (run.summary.update(summary), run.finish()))

    def where(self) -> dict[str, Any]:
        """Say where W&B has the run; a run that is not logged there has no folder and no id."""
        if self.mode == "disabled":
            return {"mode": self.mode}
        parts = len(list(self._folder.parent.glob(f"*run-*-{self._id}")))
        where = {"mode": self.mode, "dir": str(self._folder), "id": self._id, "parts": parts}
        return {**where, "url": self._url} if self._url else where

    def _start(self, mode: Any) -> None:
        run, self.mode, self._logged = start_wandb(mode, self._id, **self._settings)
        self._run: Any = run
        self._folder = Path(run.dir).parent if run else self._run_dir / "wandb"
        self._url = run.url if self.mode == "online" else None
        self._is_kept = self.mode == "offline" and self._folder.exists()
        self._tell(_draw_against_tokens)

    def _tell(self, tell: Callable[[Any], object]) -> None:
        """Call W&B, whose process a signal to all may have ended: that must not end the run."""
        if self._run is None:
            return
        try:
            tell(self._run)
        except Exception as error:
            self._run = None
            with suppress(Exception):  # or it would try, and fail, to take leave of it when Python ends
                import wandb

                wandb.teardown()
            self._say(
                f"W&B has ended ({error}); {self._kept_in} has what it misses, and gives it to W&B on resuming",
                logging.WARNING,
            )


def _draw_against_tokens(run: Any) -> None:
    """Have W&B draw all charts against the tokens trained on, so that runs of different batches compare."""
    run.define_metric("tokens")
    for group in groups():
        run.define_metric(f"{group}/*", step_metric="tokens")
