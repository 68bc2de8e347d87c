"""Start-up of Weights & Biases: the id of a run, online or offline, and the step it goes on from.

W&B is imported where it is used: a run that does not log there does not need it installed.
"""

import logging
import netrc
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import psutil

from conf.train_settings import WandbConfig, WandbMode

log = logging.getLogger(__name__)

ID_FILE = "id"
"""In the folder of W&B, the id of the run there. Earlier runs have it in run-id, which wandb takes for a run."""
INIT_TIMEOUT = 20.0
"""Seconds that W&B's server has to answer at the start of a run, where WANDB_INIT_TIMEOUT does not say it."""


def kept_id(run_dir: Path) -> tuple[Path, str] | None:
    """Read the id that a folder keeps of its W&B run: the file and what it says; None where there is none."""
    for name in (ID_FILE, "run-id"):
        path = run_dir / "wandb" / name
        with suppress(OSError, ValueError):  # not there, or no text
            if known := path.read_text("utf-8").strip():
                return path, known
    return None


def wandb_id(run_dir: Path) -> str:
    """Read or make the id of a folder's W&B run; the folder keeps it, so that the run goes on in W&B too."""
    if kept := kept_id(run_dir):
        return kept[1]
    path = run_dir / "wandb" / ID_FILE
    made = secrets.token_hex(4)
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(made + "\n", "utf-8")
    except OSError as error:
        log.warning("W&B: the id of this run could not be kept (%s); resumed, it is another run there", error)
    return made


def start_wandb(mode: Any, run_id: str, **run: Any) -> tuple[Any, str, int]:
    """Start or go on with a W&B run; one that cannot be started is said, and is not logged there.

    Args:
        mode: from `wandb_mode`.
        run_id: from `wandb_id`.
        run: arguments of `wandb.init`, ``dir`` among them.

    Returns:
        The run, None where it is disabled; its mode, offline where it should be online and no server or key lets it be,
        disabled where its files cannot be written; the last step that it holds already, -1 for none.
    """
    if mode == "disabled":
        return None, mode, -1
    try:
        return _start_wandb(mode, run_id, **run)
    except Exception as error:
        log.warning("W&B could not be started, so this run is not logged there: %s", (str(error) or repr(error)))
        return None, "disabled", -1


def _start_wandb(mode: Any, run_id: str, **run: Any) -> tuple[Any, str, int]:
    import wandb

    from train.wandb_file import last_offline_step

    with _mode_in_environment(mode):
        settings = wandb.Settings(silent=True, console="off")
    if "WANDB_INIT_TIMEOUT" not in os.environ:
        settings.init_timeout = INIT_TIMEOUT  # by default W&B retries for 90 s, while all ranks wait
    offline_before = last_offline_step(run["dir"] / "wandb", run_id)
    logged_offline = -1 if offline_before is None else offline_before
    if mode == "online" and offline_before is not None:
        # Steps that were only logged offline can be uploaded in order, and not behind later ones.
        log.warning("W&B: this run was logged offline so far, and goes on offline; wandb sync uploads all of it")
        mode = "offline"
    try:
        # Offline, the id alone says that it is the same run.
        goes_on: Literal["allow"] | None = "allow" if mode == "online" else None
        with _mode_in_environment(mode):
            started = wandb.init(mode=mode, settings=settings, id=run_id, resume=goes_on, **run)
        return started, mode, started.starting_step - 1 if mode == "online" else logged_offline
    except wandb.Error as error:
        if mode == "offline":
            raise
        log.warning("W&B %s failed, so this run is logged offline: %s", mode, str(error).splitlines()[0])
    with _mode_in_environment("offline"):
        return wandb.init(mode="offline", settings=settings, id=run_id, **run), "offline", logged_offline


@contextmanager
def _mode_in_environment(mode: str) -> Iterator[None]:
    """Have WANDB_MODE say the mode for a while: W&B refuses an unknown one there, even where it is not asked to look.

    Whatever else this process does with W&B then finds what its user set.
    """
    before = os.environ.get("WANDB_MODE")
    os.environ["WANDB_MODE"] = mode
    try:
        yield
    finally:
        os.environ.pop("WANDB_MODE", None)
        if before is not None:
            os.environ["WANDB_MODE"] = before


def end_wandb() -> None:
    """End the process that W&B's client has started here, with all that it runs; what waits for it gets an error."""
    for child in psutil.Process().children():
        with suppress(psutil.Error, OSError):
            if child.name() == "wandb-core":  # it leads a group of its own
                os.killpg(child.pid, signal.SIGKILL)
                child.wait(10.0)


def wandb_mode(settings: WandbConfig) -> Any:
    """Resolve `wandb.mode=auto`: W&B's own variable, else online where there is a key, else offline."""
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
        import wandb

        own = os.environ.get("WANDB_BASE_URL")
        for url in [own] if own else [wandb.Settings().base_url, "https://api.wandb.ai"]:
            has_key = has_key or keys.authenticators(urlparse(url).hostname or "") is not None
    return "online" if has_key else "offline"
