"""`deepnarrow dashboard`: a W&B workspace with the panels of `launch.report.panels`, as code.

W&B draws a chart of its own for each figure that a run logs, in no order; a workspace has them in the order in which
they are asked for, by several runs together, and bars and pictures where these say more. It is made by
wandb-workspaces, whose objects check what they are given.
"""

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from conf.train_settings import WandbConfig
from launch.report.panels import SECTIONS, Panel, Shape, wandb_name, wandb_pattern
from model.problems import BadInput
from train.names import GROUPED
from train.wandb_run import wandb_mode

if TYPE_CHECKING:
    from wandb_workspaces import workspaces

STUDY_PICTURES = ["loss", "tradeoff", "heads", "long-range", "windows", "warm-starts", "roofline"]
STUDY_TABLES = ["val_loss", "orderings", "decode", "smaller_model", "windows_loss", "warm_starts", "head_figures"]
"""What `deepnarrow gqa-study` logs."""
COLUMNS = ["summary:train/loss", "summary:val/loss", "summary:perf/tokens_per_second", "summary:perf/mfu"]
"""Beside the names of the runs."""
SMOOTHING = 0.9
"""The weight of the points before one, in W&B's exponential mean; the single steps stay pale behind it."""


def run(options: argparse.Namespace) -> int:
    """Save the workspace in the user's W&B account, or write what would be saved.

    Raises:
        BadInput: wandb-workspaces is not installed, no account is set up, W&B cannot be reached or refuses, or the file
            cannot be written.
    """
    if options.out is not None or options.print:
        spec = json.dumps(as_json(workspace(options.project, options.entity or "")), indent=2)
        if options.out is None:
            print(spec)
            return 0
        try:
            options.out.write_text(spec + "\n", "utf-8")
        except OSError as error:
            raise BadInput([f"--out={options.out}: {error.strerror}"]) from None
        print(f"{options.out}: the workspace as W&B would keep it")
        return 0
    print(save(options.project, options.entity))
    return 0


def workspace(project: str, entity: str) -> "workspaces.Workspace":
    """Make the workspace.

    Args:
        project: W&B's.
        entity: the team or user that has it.

    Raises:
        BadInput: wandb-workspaces is not installed.
    """
    ws, wr = _library()
    sections = [
        ws.Section(
            name=section.title,
            is_open=True,
            panels=[_panel(panel) for panel in section.panels],
            layout_settings=ws.SectionLayoutSettings(columns=min(3, len(section.panels)), rows=2),
            panel_settings=ws.SectionPanelSettings(x_axis="tokens"),
        )
        for section in SECTIONS
    ]
    tables = [GROUPED.get("eval_table", "eval/table"), "samples"]
    sections.append(
        ws.Section(name="Samples and tables", panels=[wr.WeavePanelSummaryTable(table_name=name) for name in tables])
    )
    sections.append(
        ws.Section(
            name="GQA studies",
            panels=[
                wr.MediaBrowser(title="Pictures of a study", media_keys=STUDY_PICTURES, num_columns=2),
                *(wr.WeavePanelSummaryTable(table_name=name) for name in STUDY_TABLES),
            ],
        )
    )
    sections.append(ws.Section(name="Settings that differ", panels=[wr.RunComparer(diff_only="split")], is_open=True))
    return ws.Workspace(
        name="deepnarrow",
        project=project,
        entity=entity,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="tokens", point_visualization_method="bucketing"),  # which keeps spikes
        runset_settings=ws.RunsetSettings(pinned_columns=list(COLUMNS)),
    )


def as_json(made: "workspaces.Workspace") -> dict[str, Any]:
    """Return the workspace as W&B keeps it: the very object that is saved."""
    found: dict[str, Any] = made._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    return found


def save(project: str, entity: str | None) -> str:
    """Save the workspace, as a further view of the project; return its address.

    Raises:
        BadInput: no account is set up, or W&B cannot be reached or refuses.
    """
    _library()
    if wandb_mode(WandbConfig()) != "online":
        asked = os.environ.get("WANDB_MODE")
        why = f"WANDB_MODE={asked}" if asked else "no W&B account is set up here"
        raise BadInput(
            [
                f"dashboard: {why}, and a workspace is kept by W&B; `wandb login` or WANDB_API_KEY would work; --print "
                "and --out write what would be saved, and `deepnarrow report` needs no account"
            ]
        )
    import wandb

    try:
        made = workspace(project, entity or wandb.Api().default_entity or "")
        made.save()
        return str(made.url)
    except Exception as error:  # of W&B's, of the network, of what the server answers
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise BadInput(
            [
                f"dashboard: W&B has not saved it: {reason}; a project that is there (wandb.project of a run that was "
                "logged online) would work, and `deepnarrow report` needs no account"
            ]
        ) from None


def _panel(panel: Panel) -> Any:
    _, wr = _library()
    if panel.shape is Shape.timelines:
        key = GROUPED.get("timeline", "timeline")
        return wr.MediaBrowser(title=panel.title, media_keys=[key], num_columns=1, mode="gallery", gallery_axis="step")
    single = all("{}" not in figure for figure in panel.figures)
    patterns = [wandb_pattern(figure) for figure in panel.figures]
    smoothing: dict[str, Any] = {"smoothing_type": "none"}
    if panel.smoothed:
        smoothing = {
            "smoothing_type": "exponential",
            "smoothing_factor": SMOOTHING,
            "smoothing_show_original": True,
        }
    return wr.LinePlot(
        title=panel.title,
        x="tokens",
        y=[wandb_name(figure) for figure in panel.figures] if single else [],
        metric_regex=None if single else "|".join(patterns),
        title_x="tokens trained on",
        title_y=panel.unit or None,
        log_y=panel.log or None,
        range_y=(0, None) if panel.zero and not panel.log else (None, None),
        point_visualization_method="bucketing-gorilla",
        **smoothing,
    )


def _library() -> tuple[Any, Any]:
    """Import wandb-workspaces, which is an extra."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise BadInput(
            [f"dashboard: wandb-workspaces cannot be imported ({error}); pip install -e '.[dashboard]' would work"]
        ) from None
    return workspaces, reports
