"""The command `deepnarrow gqa-study`: pretrain, regroup, uptrain, measure, and report the results."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.schema import to_jsonable
from launch.study.decode import decode_seconds
from launch.study.findings import as_text, findings
from launch.study.pictures import draw
from launch.study.plan import Plan, Uptraining, plan
from launch.supervise import launch
from model.problems import BadInput
from model.regroup import Method, Regrouped
from train import pretrain
from train import pretrained as trained
from train.preflight import preflight
from train.pretrained import Source, open_source
from train.records import METRICS, SUMMARY
from train.strict_json import dumps, with_nan
from train.version import code_version
from train.wandb_run import start_wandb, wandb_id, wandb_mode

Launch = Callable[[Sequence[str], int, Path], int]
RESULTS, TEXT = "study.json", "study.txt"
SHARD_BYTES = 5 * 10**9


def run(overrides: Sequence[str], launch: Launch = launch) -> int:
    """Run everything of a study that has not been done yet; return the exit code.

    Each training is a run with its own folder and its own run in W&B, started as `deepnarrow train` starts one. A
    training that is complete is not repeated, and one that was stopped is resumed.

    Args:
        overrides: the overrides of the command.
        launch: the function that starts a training and waits for it.

    Raises:
        BadInput: the study cannot work; it lists every problem, before anything is trained.
    """
    study = plan(overrides)
    source = study.source
    if source is None:
        run_dir = study.folder / "pretrained"
        assert study.pretrain is not None
        if not _complete(run_dir):
            _say(f"pretraining in {run_dir}")
            if code := _train(study.pretrain, launch):
                return code
            if not _complete(run_dir):
                return _stopped()
        source = open_source(run_dir)
    assert source.run is not None

    losses = []
    uptrainings = study.uptrainings(source.run.tokens)
    for number, uptraining in enumerate(uptrainings, 1):
        run_dir = study.run_dir(uptraining)
        if not _complete(run_dir):
            start = _weights(study, uptraining.kv_heads, uptraining.method, source)
            _say(f"uptraining {number} of {len(uptrainings)} in {run_dir}")
            if code := _train(study.overrides(uptraining, start), launch):
                return code
            if not _complete(run_dir):
                return _stopped()
        losses.append((uptraining, _losses(run_dir, uptraining)))

    settings, own = study.settings, source.weights.config.n_kv_heads
    # The time of a token depends on the shape alone, so that the weights of one method stand for all.
    folders = {n: _weights(study, n, None if n == own else settings.methods[0], source) for n in study.kv_heads}
    models = {n: open_source(folder, checked=False).weights for n, folder in folders.items()}
    times, device = decode_seconds(models, settings.batches, settings.contexts, _say)
    found = findings(study, source, losses, times, device)
    pictures = draw(found, study.folder)
    (study.folder / RESULTS).write_text(dumps(found, indent=2) + "\n", "utf-8")
    text = as_text(found)
    (study.folder / TEXT).write_text(text + "\n", "utf-8")
    print(text)
    print(f"\n{study.folder}: {RESULTS}, {TEXT}, {', '.join(path.name for path in pictures)}")
    _log(study, found, pictures)
    return 0


def _train(overrides: list[str], launch: Launch) -> int:
    prepared = preflight(overrides)
    arguments = pretrain.for_ranks(prepared.arguments, prepared.run_dir)
    return launch(arguments, prepared.layout.world_size, prepared.run_dir)


def _complete(run_dir: Path) -> bool:
    try:
        return bool(json.loads((run_dir / SUMMARY).read_text("utf-8"))["complete"])
    except (OSError, ValueError, KeyError):
        return False


def _stopped() -> int:
    _say("stopped; the same command goes on")
    return 0


def _weights(study: Plan, kv_heads: int, method: Method | None, source: Source) -> Path:
    """Return the weights an uptraining begins with, after regrouping the heads where they are not the original ones."""
    if method is None:
        return source.path
    folder = study.weights(kv_heads, method)
    if not folder.exists():
        regrouped = Regrouped(source.weights, kv_heads, method)
        with trained.new_folder(folder) as unfinished:
            trained.write_checkpoint(regrouped, source, unfinished, SHARD_BYTES)
    return folder


def _losses(run_dir: Path, uptraining: Uptraining) -> dict[float, float]:
    """Read the validation loss at each share of an uptraining, 0 included."""
    records = [with_nan(json.loads(line)) for line in (run_dir / METRICS).read_text("utf-8").splitlines()]
    by_step = {record["step"]: record["val_loss"] for record in records if "val_loss" in record}
    try:
        shares = zip((0.0, *uptraining.alphas), (0, *uptraining.steps), strict=True)
        return {alpha: by_step[step] for alpha, step in shares}
    except KeyError as missing:
        works = "study.dir=… of its own, or removing this folder, would work"
        raise BadInput([f"{run_dir}: was trained without a validation after step {missing}; {works}"]) from None


def _log(study: Plan, found: dict[str, Any], pictures: list[Path]) -> None:
    """Log the results as a run of their own in W&B, where that is not disabled."""
    settings = study.config.wandb
    run, _, _ = start_wandb(
        wandb_mode(settings),
        wandb_id(study.folder),
        project=settings.project,
        entity=settings.entity,
        tags=settings.tags,
        name=study.folder.name,
        dir=study.folder,
        config={
            "study": to_jsonable(asdict(study.settings)),
            **to_jsonable(asdict(study.config)),
            "code": code_version(),
        },
    )
    if run is None:
        return
    import wandb

    columns: list[str | int] = ["attention", "kv_heads", "method", "alpha", "val_loss"]
    rows = [
        [model["attention"], model["kv_heads"], method, float(alpha), loss]
        for model in found["models"]
        for method, losses in model["val_loss"].items()
        for alpha, loss in losses.items()
    ]
    times = [
        [model["attention"], model["kv_heads"], model["kv_cache_bytes_per_token"], *time.values()]
        for model in found["models"]
        for time in model["decode"]
    ]
    columns_of_times: list[str | int] = [
        "attention",
        "kv_heads",
        "kv_cache_bytes_per_token",
        "batch",
        "context",
        "seconds",
    ]
    run.log(
        {
            "val_loss": wandb.Table(columns=columns, data=rows),
            "decode": wandb.Table(columns=columns_of_times, data=times),
            **{path.stem: wandb.Image(str(path)) for path in pictures},
        }
    )
    run.summary.update({"orderings": found["orderings"], "efficiency_gain": found["efficiency_gain"]})
    run.finish()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
