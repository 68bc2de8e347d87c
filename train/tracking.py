"""What a run says: metrics.jsonl, Weights & Biases, the terminal. Only rank 0 has a tracker."""

import json
import logging
import netrc
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb
from tqdm import tqdm

from conf.schema import Config
from conf.settings import WandbConfig, WandbMode

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
INIT_TIMEOUT = 20.0
"""Seconds that W&B's server has to answer at the start of a run."""


class Tracker:
    """One record per step to every place; text to the terminal and the log.

    Args:
        config: all settings, logged with the run.
        run_dir: where metrics.jsonl, summary.json and the W&B files go; exists.
        steps: length of the run, for the progress bar.
        facts: what else identifies the run: layout, device, parameters.
    """

    def __init__(self, config: Config, run_dir: Path, steps: int, facts: dict[str, Any]):
        self.run_dir = run_dir
        self._metrics = open(run_dir / METRICS, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        self._wandb, self.mode = _start(
            wandb_mode(config.wandb),
            project=config.wandb.project,
            entity=config.wandb.entity,
            tags=config.wandb.tags,
            name=config.name,
            dir=run_dir,
            config={**plain(asdict(config)), **facts, "code": code_version()},
        )
        self._steps = steps
        # A bar where someone watches; in a log file, a line now and then.
        self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        self._said = 0

    def step(self, record: dict[str, Any]) -> None:
        """Log one step; `record` has at least step, loss, grad_norm, lr and tokens."""
        print(json.dumps(record), file=self._metrics, flush=True)
        flat = {key: value for key, value in record.items() if not isinstance(value, list)}
        flat |= {f"memory_gib/stage{i}": gib for i, gib in enumerate(record.get("memory_gib", []))}
        self._wandb.log(flat, step=record["step"])
        step, text = record["step"], f"loss {record['loss']:.4f}  lr {record['lr']:.2e}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)
        elif step == 1 or step == self._steps or step * 20 // self._steps > self._said:
            self._said = step * 20 // self._steps
            log.info("step %d/%d  %s  %.0f tokens/s", step, self._steps, text, record["tokens_per_second"])
        if "val_loss" in record:
            self.say(f"step {step}: validation loss {record['val_loss']:.4f}")

    def say(self, text: str) -> None:
        """Write a line to the terminal and the log without tearing the progress bar."""
        with tqdm.external_write_mode(file=sys.stderr):
            log.info(text)

    def samples(self, prompts: list[str], texts: list[str]) -> None:
        """Log text drawn from the model."""
        if self._bar is not None:
            self._bar.close()
        table = wandb.Table(columns=["prompt", "text"], data=[[p, t] for p, t in zip(prompts, texts, strict=True)])
        self._wandb.log({"samples": table})

    def finish(self, summary: dict[str, Any]) -> None:
        """Close everything; summary.json is written last and says that the run is complete."""
        if self._bar is not None:
            self._bar.close()
        self._wandb.summary.update(summary)
        summary["wandb"] = {"mode": self.mode, "dir": str(Path(self._wandb.dir).parent)}
        if self.mode == "online":
            summary["wandb"]["url"] = self._wandb.url
        self._wandb.finish()
        self._metrics.close()
        unfinished = self.run_dir / (SUMMARY + ".tmp")
        unfinished.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        unfinished.rename(self.run_dir / SUMMARY)


def _start(mode: Any, **run: Any) -> tuple[Any, str]:
    """The W&B run and its mode: offline where there should be an online one and no server or key lets it be."""
    # By default W&B retries for 90 s, while all ranks wait.
    os.environ["WANDB_MODE"] = mode  # W&B refuses an unknown one there, even where it is not asked to look
    settings = wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT)
    try:
        return wandb.init(mode=mode, settings=settings, **run), mode
    except wandb.Error as error:
        if mode == "offline":
            raise
        log.warning("W&B %s failed, so this run is logged offline: %s", mode, str(error).splitlines()[0])
    os.environ["WANDB_MODE"] = "offline"
    return wandb.init(mode="offline", settings=settings, **run), "offline"


def wandb_mode(settings: WandbConfig) -> Any:
    """What `wandb.mode=auto` means here: W&B's own variable, else online where there is a key, else offline."""
    if settings.mode is not WandbMode.auto:
        return settings.mode.value
    asked = os.environ.get("WANDB_MODE", "")
    asked = {"dryrun": "offline", "run": "online"}.get(asked, asked)  # W&B's older names
    if asked in ("online", "offline", "disabled"):
        return asked
    has_key = bool(os.environ.get("WANDB_API_KEY"))
    with suppress(OSError, netrc.NetrcParseError):
        keys = netrc.netrc(os.environ.get("NETRC"))
        # `wandb login` keeps the key under the server's name, which is not the same in all versions of W&B.
        own = os.environ.get("WANDB_BASE_URL")
        for url in [own] if own else [wandb.Settings().base_url, "https://api.wandb.ai"]:
            has_key = has_key or keys.authenticators(urlparse(url).hostname or "") is not None
    return "online" if has_key else "offline"


def code_version() -> str:
    """The commit this code is at, with ``+changes`` where the working tree differs; else the installed version."""
    root = Path(__file__).parent.parent
    with suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
        return commit + ("+changes" if changes.strip() else "")
    with suppress(PackageNotFoundError):
        return version("deepnarrow")
    return "unknown"


def plain(value: Any) -> Any:
    """Nested settings with enums as their names."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value.name if isinstance(value, Enum) else value


def set_aside(run_dir: Path) -> Path | None:
    """Move what an earlier run left in this folder to ``earlier/N``, so that nothing already written is lost.

    Only what a run writes is moved, since a run folder may hold other things.

    Returns:
        The folder moved to, or None where there was nothing to move.
    """
    if not (run_dir / METRICS).exists():
        return None
    earlier = run_dir / "earlier"
    earlier.mkdir(exist_ok=True)
    taken = [int(path.name) for path in earlier.iterdir() if path.name.isdigit()]
    target = earlier / str(max(taken, default=0) + 1)
    target.mkdir()
    for name in (METRICS, SUMMARY, ".hydra", "pretrain.log", "wandb"):
        if (run_dir / name).exists():
            (run_dir / name).rename(target / name)
    return target
