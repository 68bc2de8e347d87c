"""What a report says of its runs in words: how each is, how far it has come, what it runs on, what of it is missing."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from launch.report.plots import LATEST, ShownRun
from launch.run_folder import flat, shown_settings
from launch.run_state import state_of

Row = tuple[str, list[str]]
"""A line of a table: what it says, and that of each run; empty where it is not known."""


def rows(runs: Sequence[ShownRun]) -> list[Row]:
    """Return the lines of the table at the head of a report; those that no run has anything for are left out."""
    found = [(name, [say(run) or "" for run in runs]) for name, say in _SAYERS.items()]
    return [(name, said) for name, said in found if any(said)]


def quantity(value: float) -> str:
    """Write a number of things with three digits and a word for its size: 12.9 million."""
    for size, word in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")):
        if abs(value) >= size:
            return f"{value / size:.3g}{word}"
    return f"{value:,.0f}"


def _state(run: ShownRun) -> str:
    state = state_of(run.folder)
    return f"{state}: {state.why}" if state.why else str(state)


def _steps(run: ShownRun) -> str:
    if not len(run.history):
        return "none"
    whole = run.folder.facts.get("steps")
    last = int(run.history["step",][-1])
    return f"{last:,}" + (f" of {whole:,}" if isinstance(whole, int) else "")


def _tokens(run: ShownRun) -> str:
    tokens = _finite(run, "tokens")
    whole = run.folder.facts.get("tokens")
    return quantity(tokens[-1]) + (f" of {quantity(whole)}" if isinstance(whole, int) else "") if len(tokens) else ""


def _loss(run: ShownRun) -> str:
    losses = _finite(run, "loss")
    if not len(losses):
        return ""
    last = losses[-max(10, len(losses) // 100) :]
    said = f"{losses[0]:.4f} → {losses[-1]:.4f}"
    return said + (f" (mean of the last {len(last):,}: {last.mean():.4f})" if len(last) > 1 else "")


def _val_loss(run: ShownRun) -> str:
    losses, steps = run.history["val_loss",], run.history["step",]
    there = np.flatnonzero(np.isfinite(losses))
    if not len(there):
        return ""
    best = there[np.argmin(losses[there])]
    last = f"{losses[there[-1]]:.4f} at step {steps[there[-1]]:,.0f}"
    return last if best == there[-1] else f"{last}; best {losses[best]:.4f} at step {steps[best]:,.0f}"


def _speed(run: ShownRun) -> str:
    speeds = _finite(run, "tokens_per_second")
    if not len(speeds):
        return ""
    median = float(np.median(speeds[-LATEST:]))
    return f"{median:,.0f} tokens/s, {quantity(86400 * median)} a day"


def _mfu(run: ShownRun) -> str:
    halved, whole = (_finite(run, name)[-LATEST:] for name in ("mfu", "mfu_whole_attention"))
    if not len(halved):
        return ""
    counted = f" ({np.median(whole):.1%} with attention counted whole)" if len(whole) else ""
    return f"{np.median(halved):.1%}{counted}"


def _time(run: ShownRun) -> str:
    seconds = float(np.nansum(run.history["seconds",]))
    return _duration(seconds) if seconds else ""


def _not_training(run: ShownRun) -> str:
    """Say what evaluation, saves and failures have cost beside the steps."""
    training = float(np.nansum(run.history["seconds",]))
    parts = {
        "evaluation": float(np.nansum(run.history["eval_seconds",])),
        "saves": float(np.nansum(run.history["save_blocked_seconds",])),
        "failures": sum(_lost(event) for event in run.folder.events),
    }
    said = [
        f"{name} {_duration(spent)} ({spent / training:.2%})" for name, spent in parts.items() if spent and training
    ]
    return ", ".join(said)


def _lost(event: dict[str, Any]) -> float:
    seconds = event.get("seconds")
    lost = seconds.get("lost") if isinstance(seconds, dict) else None
    return float(lost) if isinstance(lost, int | float) else 0.0


def _model(run: ShownRun) -> str:
    settings, parameters = flat(run.folder.config), run.folder.facts.get("parameters")
    said = [str(settings["preset"])] if "preset" in settings else []
    said += [f"{quantity(parameters)} parameters"] if isinstance(parameters, int) else []
    if "model.n_layers" in settings:
        heads = f"{settings.get('model.n_heads')} heads on {settings.get('model.n_kv_heads')}"
        said.append(f"{settings['model.n_layers']} layers x {settings.get('model.d_model')}, {heads}")
    return ", ".join(said)


def _layout(run: ShownRun) -> str:
    layout, settings = run.folder.facts.get("layout"), flat(run.folder.config)
    layout = layout if isinstance(layout, dict) else {}
    sizes = {axis: layout.get(axis, settings.get(f"parallel.{axis}")) for axis in ("dp", "pp", "tp")}
    said = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size is not None)
    if (sizes["pp"] or 1) > 1 and "parallel.schedule" in settings:
        said += f", {getattr(settings['parallel.schedule'], 'name', settings['parallel.schedule'])}"
    return said


def _device(run: ShownRun) -> str:
    facts = run.folder.facts
    ranks = f"{facts['world_size']:,} x " if isinstance(facts.get("world_size"), int) else ""
    said = [f"{ranks}{facts['device']}"] if "device" in facts else []
    return ", ".join([*said, *([str(facts["precision"])] if "precision" in facts else [])])


def _code(run: ShownRun) -> str:
    version, _, changes = str(run.folder.facts.get("code", "")).partition("+")
    return version[:12] + (f" with {changes}" if changes else "")


def _last_start(run: ShownRun) -> str:
    """Say when and where the run was last started, and when its last record was written."""
    started, changed = run.folder.started, run.folder.changed
    said = [f"{started['time']} on {started.get('host')}"] if "time" in started else []
    if changed is not None:
        said.append(f"last record {datetime.fromtimestamp(changed).astimezone().isoformat(timespec='seconds')}")
    return ", ".join(said)


def _failures(run: ShownRun) -> str:
    failed = sum(event.get("event") == "failed" for event in run.folder.events)
    counts = {"failure": failed, "skipped step": len(run.folder.skipped)}
    return ", ".join(f"{count:,} {name}{'s' * (count > 1)}" for name, count in counts.items() if count)


def _checkpoints(run: ShownRun) -> str:
    kept = [one for one in run.folder.checkpoints if not one.kind]
    aside = len(run.folder.checkpoints) - len(kept)
    said = f"{len(kept):,}, the newest of step {kept[0].step:,}" if kept else ""
    return said + (f"; {aside} set aside as damaged or diverged" if aside else "")


def _wandb(run: ShownRun) -> str:
    logged = run.folder.wandb
    return str(logged.get("url") or (f"run {logged['id']}" if "id" in logged else ""))


_SAYERS: dict[str, Callable[[ShownRun], str]] = {
    "state": _state,
    "steps": _steps,
    "tokens": _tokens,
    "training loss": _loss,
    "validation loss": _val_loss,
    "speed": _speed,
    "MFU": _mfu,
    "time in steps": _time,
    "besides steps": _not_training,
    "failures": _failures,
    "checkpoints": _checkpoints,
    "model": _model,
    "layout": _layout,
    "devices": _device,
    "code": _code,
    "last start": _last_start,
    "W&B": _wandb,
    "folder": lambda run: str(run.folder.path),
}


def differences(runs: Sequence[ShownRun]) -> list[Row]:
    """Return the settings that are not the same in all runs; a run that does not have one says so."""
    settings = [shown_settings(run.folder.config) for run in runs]
    keys = dict.fromkeys(key for of_run in settings for key in of_run)
    return [
        (key, [_setting(of_run, key) for of_run in settings])
        for key in keys
        if len({_setting(of_run, key) for of_run in settings}) > 1
    ]


def _setting(settings: dict[str, Any], key: str) -> str:
    return setting(settings[key]) if key in settings else "(no such key)"


def setting(value: Any) -> str:
    """Write the value of a setting: an enum by its name, a float without the digits that it cannot have had."""
    return f"{value:.12g}" if isinstance(value, float) else str(getattr(value, "name", value))


def notes(run: ShownRun) -> list[str]:
    """Say what of a run's folder cannot be read or is not as it was written."""
    said = list(run.folder.faults)
    if not len(run.history):
        said.append("metrics.jsonl has no records: nothing can be drawn of this run")
    if not run.folder.config:
        said.append(".hydra/config.yaml is not there: its settings are not known")
    if run.history.repeated:
        said.append(f"metrics.jsonl: {run.history.repeated:,} steps stand there twice; the later record counts")
    if run.history.without_step:
        said.append(f"metrics.jsonl: {run.history.without_step:,} records do not say their step, and are left out")
    lost = int((~np.isfinite(run.history["loss",])).sum()) if len(run.history) else 0
    if lost:
        said.append(f"{lost:,} records have no finite loss: passed over, not finite, or before the first step")
    if missing := run.folder.summary.get("missing_records"):
        said.append(f"metrics.jsonl lacks {missing:,} records, which the disk did not take")
    return said


def _finite(run: ShownRun, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    values = run.history[(name,)]
    return values[np.isfinite(values)]


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s"
