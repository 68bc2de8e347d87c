"""What came of the runs of a study, read from their folders."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from launch.trainings.train_all import is_complete, last_record, val_losses
from model.problems import BadInput
from train.records import SUMMARY

Setting = TypeVar("Setting")


@dataclass(frozen=True)
class Outcome(Generic[Setting]):
    """A run and its end.

    Attributes:
        setting: of the run.
        loss: the validation loss after its last step, in nats a token; NaN where it diverged.
        bits_per_byte: the same in bits a byte of text; NaN where it is not known.
        skipped_steps: steps whose updates were skipped.
    """

    setting: Setting
    loss: float
    bits_per_byte: float = math.nan
    skipped_steps: int = 0


def read_outcomes(runs: Iterable[tuple[Setting, Path, int, int]]) -> list[Outcome[Setting]]:
    """Read what came of runs that are done.

    Args:
        runs: the setting of each, its folder, steps and tokens.

    Raises:
        BadInput: folders hold runs that are not these, or that have measured no loss; it lists every one.
    """
    found, problems = [], []
    for setting, run_dir, steps, tokens in runs:
        skipped = int(json.loads((run_dir / SUMMARY).read_text("utf-8")).get("skipped_steps") or 0)
        if not is_complete(run_dir):  # it is done all the same: it has diverged
            found.append(Outcome(setting, math.nan, skipped_steps=skipped))
            continue
        losses, last = val_losses(run_dir), last_record(run_dir)
        if steps not in losses or last.get("tokens") not in (None, tokens):
            works = "removing this folder, which trains it again, would work"
            problems.append(f"{run_dir}: has no validation loss after step {steps}; {works}")
            continue
        found.append(Outcome(setting, losses[steps], last.get("val_bits_per_byte", math.nan), skipped))
    if problems:
        raise BadInput(problems)
    return found
