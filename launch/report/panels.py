"""What there is to see of a run: the panels that `deepnarrow report` draws and `deepnarrow dashboard` puts in W&B."""

import re
from dataclasses import dataclass
from enum import Enum

from launch.columns import Figure
from launch.report.history import PART
from train.names import name_of


class Shape(Enum):
    """How a panel of the report is drawn; in W&B all are lines, but for pictures, which that has of its own."""

    curves = "curves"
    """A line for each run and figure."""
    per_name = "per_name"
    """A plot for each of the names that a figure has, such as the sources of a mixture, with a line for each run."""
    shares = "shares"
    """A plot for each run, with a bar for each stage that is made up of the figures: medians of the last steps."""
    bars = "bars"
    """A group of bars for each name or stage, with a bar for each run: the last value."""
    timelines = "timelines"
    """What each stage did in a step that the run has kept."""


@dataclass(frozen=True)
class Panel:
    """A plot of figures that are seen together.

    Attributes:
        title: above it.
        figures: paths into records of metrics.jsonl, with dots between keys and ``{}`` for any name or index:
            ``loss``, ``memory_gib.{}``, ``val_sets.{}.bits_per_byte``.
        unit: of the vertical axis.
        needs: what a run has that keeps records of them, in a clause.
        labels: of the figures, where there are several.
        shape: how the report draws it.
        smoothed: whether the first figure is drawn as the mean over a window above its pale single steps.
        log: whether the vertical axis is logarithmic.
        percent: whether the figures are shares.
        zero: whether the vertical axis begins at zero, where it is not logarithmic.
        marked: whether skipped steps and failures are marked on the first figure.
    """

    title: str
    figures: tuple[str, ...]
    unit: str
    needs: str
    labels: tuple[str, ...] = ()
    shape: Shape = Shape.curves
    smoothed: bool = False
    log: bool = False
    percent: bool = False
    zero: bool = False
    marked: bool = False

    def paths(self) -> list[Figure]:
        """Return the figures as paths of `launch.columns`."""
        return [tuple(figure.split(".")) for figure in self.figures]


@dataclass(frozen=True)
class Section:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


STEPS, PIPELINE, TASKS = "a run that has taken steps", "parallel.pp above 1", "eval.tasks"
SETS, PEAK, VARIES = "data.sources or eval.sets", "GPUs whose peak is known", "a batch or a length that changes"
STAGE_SECONDS = ("forward_seconds.{}", "backward_seconds.{}", "weight_seconds.{}", "wait_seconds.{}")
PASSES = ("forward", "backward", "weights", "waiting")
HALVED, WHOLE = "causal attention halved", "attention whole"
BY_BYTES = "Accuracy by log-likelihood per byte"

SECTIONS = (
    Section(
        "Learning",
        (
            Panel("Training loss", ("loss",), "nats per token", STEPS, smoothed=True, marked=True),
            Panel("Validation loss", ("val_loss",), "nats per token", "held-out documents (data.val_fraction)"),
            Panel("Bits per byte of held-out text", ("val_bits_per_byte",), "bits", "held-out documents of one corpus"),
        ),
    ),
    Section(
        "Validation by source",
        (
            Panel("Bits per byte", ("val_sets.{}.bits_per_byte",), "bits", SETS, shape=Shape.per_name),
            Panel("Loss", ("val_sets.{}.loss",), "nats per token", SETS, shape=Shape.per_name),
        ),
    ),
    Section(
        "Evaluation tasks",
        (
            Panel("Accuracy", ("tasks.{}.accuracy",), "of the questions", TASKS, shape=Shape.per_name, percent=True),
            Panel(BY_BYTES, ("tasks.{}.accuracy_norm",), "of the questions", TASKS, shape=Shape.per_name, percent=True),
            Panel("Bits per byte of answers", ("tasks.{}.bits_per_byte",), "bits", TASKS, shape=Shape.per_name),
            Panel("Tasks that failed", ("failed_tasks",), "times so far", "tasks that failed", zero=True),
        ),
    ),
    Section(
        "Stability and schedule",
        (
            Panel("Gradient norm", ("grad_norm",), "before clipping", STEPS, smoothed=True, log=True, marked=True),
            Panel("Skipped steps so far", ("skipped_steps",), "steps", "updates that were skipped", zero=True),
            Panel("Learning rate", ("lr",), "", STEPS),
            Panel("Global batch", ("global_batch",), "sequences", VARIES),
            Panel("Sequence length", ("seq_len",), "tokens", VARIES),
        ),
    ),
    Section(
        "Speed",
        (
            Panel("Throughput", ("tokens_per_second",), "tokens per second", STEPS, smoothed=True, zero=True),
            Panel(
                "Model FLOPs utilization",
                ("mfu", "mfu_whole_attention"),
                "of the peak",
                PEAK,
                (HALVED, WHOLE),
                smoothed=True,
                percent=True,
                zero=True,
            ),
            Panel(
                "Seconds of a step",
                ("seconds", "predicted_seconds"),
                "seconds",
                STEPS,
                ("measured", "predicted"),
                smoothed=True,
                log=True,
            ),
            Panel(
                "Optimizer and reduction over replicas",
                ("optimizer_seconds",),
                "seconds",
                PIPELINE,
                smoothed=True,
                zero=True,
            ),
        ),
    ),
    Section(
        "Pipeline",
        (
            Panel(
                "Bubble",
                ("bubble", "bubble_expected"),
                "of the ranks' time",
                PIPELINE,
                ("measured", "expected"),
                smoothed=True,
                percent=True,
                zero=True,
            ),
            Panel("Seconds of a step by stage", STAGE_SECONDS, "seconds", PIPELINE, PASSES, shape=Shape.shares),
            Panel("Timelines", (), "", "train.timeline_at and parallel.pp above 1", shape=Shape.timelines),
        ),
    ),
    Section(
        "Memory and data",
        (
            Panel("Peak memory by stage", ("memory_gib.{}",), "GiB", STEPS, shape=Shape.bars),
            Panel("Tokens by source", ("source_tokens.{}",), "tokens", "data.sources", shape=Shape.bars),
            Panel("FLOPs of a token", ("flops_per_token",), "causal attention halved", STEPS, smoothed=True, zero=True),
        ),
    ),
    Section(
        "Checkpoints, evaluation, restarts",
        (
            Panel(
                "Saves",
                ("save_blocked_seconds", "save_seconds"),
                "seconds",
                "checkpoints",
                ("training stands still", "until it is on disk"),
                log=True,
            ),
            Panel("Size of a checkpoint", ("save_gib",), "GiB", "checkpoints", zero=True),
            Panel("Evaluation", ("eval_seconds",), "seconds", "validations", zero=True),
            Panel("Restarts", ("restarts",), "so far", "a run that was started again after a failure", zero=True),
            Panel("Slow ranks", ("slow_ranks.{}",), "times the fastest's seconds", "ranks that are slow"),
        ),
    ),
)
"""All panels. A new figure of records has its row in `train.names.GROUPED`, and is seen once a panel here names it."""


def panels() -> list[Panel]:
    """List the panels of all sections."""
    return [panel for section in SECTIONS for panel in section.panels]


def wandb_name(figure: str) -> str:
    """Return what W&B calls a figure of `Panel.figures`, with ``{}`` where there are several."""
    key, *parts = figure.split(".")
    return name_of(key, parts)


def wandb_pattern(figure: str) -> str:
    """Return the regular expression of the names that W&B has for a figure of `Panel.figures`."""
    return "^" + ".+".join(re.escape(part) for part in wandb_name(figure).split(PART)) + "$"
