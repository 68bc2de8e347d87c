"""What a run says: metrics.jsonl, Weights & Biases, the terminal. Only rank 0 has a tracker."""

import json
import logging
import netrc
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import wandb
from tqdm import tqdm

from conf.schema import Config, to_jsonable
from conf.train_settings import WandbConfig, WandbMode
from train.checkpoint.folder import CHECKPOINTS, newest_first, step_of
from train.checkpoint.saver import Outcome
from train.profiling import PROFILES
from train.timeline import TIMELINES
from train.wandb_file import last_offline_step

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
INIT_TIMEOUT = 20.0
"""Seconds that W&B's server has to answer at the start of a run."""


class Tracker:
    """One record per step to every place; text to the terminal and the log.

    A run that goes on keeps its earlier records and its W&B run: no step is missing there or stands twice.

    Args:
        config: all settings, logged with the run.
        run_dir: where metrics.jsonl, summary.json and the W&B files go; exists.
        steps: length of the run, for the progress bar.
        facts: what else identifies the run: layout, device, parameters.
        resumed: the step after which the run in this folder goes on; None for a run that begins here.
    """

    def __init__(self, config: Config, run_dir: Path, steps: int, facts: dict[str, Any], resumed: int | None = None):
        self.run_dir = run_dir
        self.first: dict[str, Any] | None = None
        """The record of the first step in metrics.jsonl."""
        self.last: dict[str, Any] | None = None
        """The record of the last."""
        self.val_loss: float | None = None
        """The validation loss last measured."""
        (run_dir / SUMMARY).unlink(missing_ok=True)  # it says that the run has ended
        run, self.mode, self._logged = start_wandb(
            wandb_mode(config.wandb),
            wandb_id(run_dir),
            project=config.wandb.project,
            entity=config.wandb.entity,
            tags=config.wandb.tags,
            name=config.name,
            dir=run_dir,
            config={**to_jsonable(asdict(config)), **facts, "code": code_version()},
        )
        self._wandb: Any = run
        self._wandb_folder, self._wandb_id = Path(run.dir).parent, run.id
        self._wandb_url = run.url if self.mode == "online" else None
        for record in _cut(run_dir / METRICS, resumed) if resumed is not None else ():
            self._remember(record)
            self._log(record)  # what W&B missed of it, killed with the run
        self._metrics = open(run_dir / METRICS, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        self._steps = steps
        # A bar where someone watches; in a log file, a line now and then.
        watched = sys.stderr.isatty()
        self._bar = tqdm(initial=resumed or 0, total=steps, unit="step", dynamic_ncols=True) if watched else None
        self._said: int | None = None
        self._costs: dict[str, float] = {}

    def begin(self, val_loss: float) -> None:
        """Log what trained weights are worth before the first step: a record of step 0."""
        self._keep({"step": 0, "tokens": 0, "val_loss": val_loss})
        self.say(f"before the first step: validation loss {val_loss:.4f}")

    def step(self, record: dict[str, Any]) -> None:
        """Log one step; `record` has at least step, loss, grad_norm, lr and tokens."""
        record, self._costs = {**record, **self._costs}, {}
        self._keep(record)
        step, text = record["step"], f"loss {record['loss']:.4f}  lr {record['lr']:.2e}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(1)
        elif self._said is None or step == self._steps or step * 20 // self._steps > self._said:
            self._said = step * 20 // self._steps
            log.info("step %d/%d  %s  %.0f tokens/s", step, self._steps, text, record["tokens_per_second"])
        if "val_loss" in record:
            self.say(f"step {step}: validation loss {record['val_loss']:.4f}")

    def _keep(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), file=self._metrics, flush=True)
        self._remember(record)
        self._log(record)

    def _log(self, record: dict[str, Any]) -> None:
        if record["step"] <= self._logged:  # taken and logged before, then lost with the process
            return
        flat = {key: value for key, value in record.items() if not isinstance(value, list)}
        by_stage = {key: value for key, value in record.items() if isinstance(value, list)}
        flat |= {f"{key}/stage{i}": one for key, values in by_stage.items() for i, one in enumerate(values)}
        self._tell_wandb(lambda run: run.log(flat, step=record["step"], commit=True))

    def _tell_wandb(self, tell: Callable[[Any], object]) -> None:
        """W&B runs in a process of its own, which a signal to all may end: that must not end the run."""
        if self._wandb is None:
            return
        try:
            tell(self._wandb)
        except Exception as error:
            self._wandb = None
            with suppress(Exception):  # or it would try, and fail, to take leave of it when Python ends
                wandb.teardown()
            self.say(
                f"W&B has ended ({error}); {METRICS} has what it misses, and gives it to W&B on resuming",
                logging.WARNING,
            )

    def _remember(self, record: dict[str, Any]) -> None:
        if "loss" in record:
            self.first, self.last = self.first or record, record
        self.val_loss = record.get("val_loss", self.val_loss)

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Write a line to the terminal and the log without tearing the progress bar."""
        with tqdm.external_write_mode(file=sys.stderr):
            log.log(level, text)

    def saved(self, outcome: Outcome | None) -> None:
        """Say how a save ended, if one has; what it cost stands in the record of the next step."""
        if outcome is None:
            return
        if outcome.error:
            text = f"step {outcome.step} could not be saved ({outcome.error}); older checkpoints stay"
            self.say(text, logging.ERROR)
            self._tell_wandb(lambda run: run.alert("checkpoint not saved", text, level="ERROR"))
            return
        gib = outcome.num_bytes / 2**30
        self.say(
            f"step {outcome.step} saved: {gib:.2f} GiB, {outcome.blocked:.2f} s without training, on disk after "
            f"{outcome.seconds:.1f} s"
        )
        self._costs = {"save_blocked_seconds": outcome.blocked, "save_seconds": outcome.seconds, "save_gib": gib}

    def sync(self) -> None:
        """Make metrics.jsonl durable."""
        os.fsync(self._metrics.fileno())

    def samples(self, prompts: list[str], texts: list[str]) -> None:
        """Log text drawn from the model."""
        if self._bar is not None:
            self._bar.close()
        table = wandb.Table(columns=["prompt", "text"], data=[[p, t] for p, t in zip(prompts, texts, strict=True)])
        self._tell_wandb(lambda run: run.log({"samples": table}))

    def picture(self, name: str, path: Path) -> None:
        """Log a picture, with the next step."""
        self._tell_wandb(lambda run: run.log({name: wandb.Image(str(path))}, commit=False))

    def finish(self, summary: dict[str, Any], ended: bool = True) -> None:
        """Close everything; summary.json is written last and says that the run ended as it should.

        Args:
            summary: is completed with where W&B's files are.
            ended: whether it did.
        """
        if self._bar is not None:
            self._bar.close()
        self._tell_wandb(lambda run: (run.summary.update(summary), run.finish()))
        parts = len(list(self._wandb_folder.parent.glob(f"*run-*-{self._wandb_id}")))
        where = {"mode": self.mode, "dir": str(self._wandb_folder), "id": self._wandb_id, "parts": parts}
        summary["wandb"] = {**where, "url": self._wandb_url} if self._wandb_url else where
        self._metrics.close()
        if not ended:
            return
        unfinished = self.run_dir / (SUMMARY + ".tmp")
        unfinished.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        unfinished.rename(self.run_dir / SUMMARY)


def _cut(metrics: Path, last_step: int) -> Iterator[dict[str, Any]]:
    """The records up to a step, once the rest and what a dying process left of a line are out of the file."""
    kept, whole = [], True
    with suppress(FileNotFoundError), open(metrics, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            record = None
            with suppress(ValueError):
                record = json.loads(line)
            if isinstance(record, dict) and line.endswith("\n") and record.get("step", last_step + 1) <= last_step:
                kept.append(line)
                yield record
            else:
                whole = False
    if not whole:
        unfinished = metrics.with_name(METRICS + ".tmp")
        with open(unfinished, "w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(metrics)


def wandb_id(run_dir: Path) -> str:
    """The id of the W&B run of this folder; kept in it, so that the run goes on in W&B too."""
    path = run_dir / "wandb" / "run-id"
    with suppress(OSError):
        if known := path.read_text("utf-8").strip():
            return known
    path.parent.mkdir(exist_ok=True)
    path.write_text(secrets.token_hex(4) + "\n", "utf-8")
    return path.read_text("utf-8").strip()


def start_wandb(mode: Any, run_id: str, **run: Any) -> tuple[Any, str, int]:
    """Start or go on with a W&B run.

    Args:
        mode: from `wandb_mode`.
        run_id: from `wandb_id`.
        run: arguments of `wandb.init`, ``dir`` among them.

    Returns:
        The run; its mode, offline where it should be online and no server or key lets it be; the last step that it
        holds already, -1 for none.
    """
    # By default W&B retries for 90 s, while all ranks wait.
    os.environ["WANDB_MODE"] = mode  # W&B refuses an unknown one there, even where it is not asked to look
    settings = wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT)
    offline_before = last_offline_step(run["dir"] / "wandb", run_id)
    logged_offline = -1 if offline_before is None else offline_before
    if mode == "online" and offline_before is not None:
        # Steps that were only logged offline can be uploaded in order, and not behind later ones.
        log.warning("W&B: this run was logged offline so far, and goes on offline; wandb sync uploads all of it")
        mode = os.environ["WANDB_MODE"] = "offline"
    try:
        # Offline, the id alone says that it is the same run.
        goes_on: Literal["allow"] | None = "allow" if mode == "online" else None
        started = wandb.init(mode=mode, settings=settings, id=run_id, resume=goes_on, **run)
        return started, mode, started.starting_step - 1 if mode == "online" else logged_offline
    except wandb.Error as error:
        if mode == "offline":
            raise
        log.warning("W&B %s failed, so this run is logged offline: %s", mode, str(error).splitlines()[0])
    os.environ["WANDB_MODE"] = "offline"
    return wandb.init(mode="offline", settings=settings, id=run_id, **run), "offline", logged_offline


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


@cache
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


def set_aside(run_dir: Path, after: int | None = None) -> Path | None:
    """Move what an earlier run left in this folder to ``earlier/N``, so that nothing already written is lost.

    Only what a run writes is moved, since a run folder may hold other things.

    Args:
        run_dir: the run folder.
        after: for a run that goes back to this step of the one before: what that was up to there stays, checkpoints and
            records (the latter are copied, and the run then drops those that follow).

    Returns:
        The folder moved to, or None where there was nothing to move.
    """
    newer = [path for path in newest_first(run_dir / CHECKPOINTS) if (step_of(path) or 0) > (after or 0)]
    if not (run_dir / METRICS).exists() and not newer:
        return None
    earlier = run_dir / "earlier"
    earlier.mkdir(exist_ok=True)
    taken = [int(path.name) for path in earlier.iterdir() if path.name.isdigit()]
    target = earlier / str(max(taken, default=0) + 1)
    target.mkdir()
    if after is None:
        moved = [METRICS, CHECKPOINTS, TIMELINES, PROFILES]
    else:
        moved = [f"{CHECKPOINTS}/{path.name}" for path in newer]
        (target / CHECKPOINTS).mkdir()
        with suppress(FileNotFoundError):
            shutil.copyfile(run_dir / METRICS, target / METRICS)
    for name in (*moved, SUMMARY, ".hydra", "pretrain.log", "wandb"):
        if (run_dir / name).exists():
            (run_dir / name).rename(target / name)
    return target
