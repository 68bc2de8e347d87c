"""Settings of Weights & Biases judged before a run starts: names, tags, and the environment variables that W&B reads.

W&B's own `wandb.Settings` judges what it can, without a network. It is imported only where there is something to judge
and W&B is not disabled.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.paths import expanded, name_problems, unwritable
from conf.schema import Config
from conf.train_settings import WandbConfig, WandbMode
from train.wandb_run import kept_id, wandb_mode

_MODES = ("online", "offline", "disabled", "dryrun", "run")
"""The modes that W&B's variable may name, the last two by their older names."""
_RESERVED = "/\\#?%:"
"""Characters that no project, and no user or team, has in its name: they stand in its address."""
_LONGEST = 128
"""Characters of the name of a project or run, for W&B's server."""
_FOLDERS = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")
_SECRET = ("KEY", "TOKEN", "PROXY", "HEADERS")
_INSTEAD = {
    "WANDB_PROJECT": "wandb.project",
    "WANDB_TAGS": "wandb.tags",
    "WANDB_NAME": "name",
    "WANDB_RUN_ID": "hydra.run.dir, whose W&B run goes on",
    "WANDB_DIR": "hydra.run.dir, which W&B's files stand in",
}
"""Variables that W&B gets told otherwise, and what says it."""


def problems(config: Config, run_dir: Path, environment: Mapping[str, str]) -> list[str]:
    """Say why W&B would refuse a run, in a sentence each; nothing where it is disabled.

    Args:
        config: of the run.
        run_dir: its folder, which keeps the id of its run in W&B.
        environment: of the process that logs there.
    """
    asked = environment.get("WANDB_MODE", "")
    if config.wandb.mode is WandbMode.auto and asked not in ("", *_MODES):
        works = "online, offline or disabled would work, or wandb.mode=…"
        return [f"WANDB_MODE={asked}: not a mode that a run can have; {works}", *_names(config)]
    if wandb_mode(config.wandb) == "disabled":
        return []
    found = _names(config) + _folders(environment)
    set_there = {key: value for key, value in environment.items() if key.startswith("WANDB_") and key != "WANDB_MODE"}
    known_id = kept_id(run_dir)
    settings = config.wandb
    if not found and not set_there and known_id is None and settings == WandbConfig(mode=settings.mode):
        return found
    return found + _as_wandb_has_it(settings, set_there, known_id, judged=bool(found))


def warnings(config: Config, environment: Mapping[str, str]) -> list[str]:
    """Say of each variable of W&B's that has no effect what has, in a sentence."""
    if wandb_mode(config.wandb) == "disabled":
        return []
    return [
        f"{key} is set and not used: {instead} says it" for key, instead in _INSTEAD.items() if environment.get(key)
    ]


def _names(config: Config) -> list[str]:
    """Judge by the rules of W&B's server, which says them only once a run starts."""
    settings, found = config.wandb, []
    for key, value in (("wandb.project", settings.project), ("wandb.entity", settings.entity)):
        if value is None:
            continue
        reserved = _RESERVED + " " * (key == "wandb.entity")
        wrong = sorted({char for char in value.strip() if char in reserved or not char.isprintable()})
        works = "".join("-" if char in wrong else char for char in value.strip())[:_LONGEST].strip("-") or "deepnarrow"
        if not value.strip():
            null = "; null takes the account's own" if key == "wandb.entity" else f"; {key}={works} would work"
            found.append(f"{key}={value!r}: is empty{null}")
        elif wrong:
            said = ", ".join(repr(char) for char in wrong)
            both = _both(value) if key == "wandb.project" else ""
            found.append(f"{key}={value}: has {said} in it, which W&B refuses; {both}{key}={works} would work")
        elif len(value) > _LONGEST:
            found.append(
                f"{key}={value}: has {len(value)} characters, and W&B takes {_LONGEST}; a shorter one would work"
            )
    if len(config.name) > _LONGEST and not name_problems(
        "name", config.name
    ):  # one that no folder takes is refused as such
        works = "a shorter one, or wandb.mode=disabled, would work"
        found.append(f"name={config.name[:20]}…: has {len(config.name)} characters, and W&B takes {_LONGEST}; {works}")
    for tag in settings.tags:
        if not 1 <= len(tag) <= 64:
            why = f"has {len(tag)} characters" if tag else "is empty"
            shown = f"{tag[:20]}{'…' * (len(tag) > 20)}" if tag else repr(tag)
            found.append(f"wandb.tags=[{shown}]: this tag {why}; 1 to 64 characters would work")
    return found


def _both(project: str) -> str:
    """Say how a team and its project are said, where they stand in one."""
    entity, slash, name = project.partition("/")
    plain = slash and entity and name and not any(char in _RESERVED for char in entity + name)
    return f"wandb.entity={entity} wandb.project={name} or " if plain else ""


def _folders(environment: Mapping[str, str]) -> list[str]:
    """Find folders of W&B's own that can be neither written nor made."""
    found = []
    for key in _FOLDERS:
        given = environment.get(key)
        if given and (why := unwritable(expanded(given))):
            found.append(f"{key}={given}: {why}; a folder that can be written, or unsetting it, would work")
    return found


def _as_wandb_has_it(
    settings: WandbConfig, variables: Mapping[str, str], known_id: tuple[Path, str] | None, judged: bool
) -> list[str]:
    """Have W&B judge the settings that it is given, each by itself."""
    import wandb

    found = []
    if not judged and (why := _refusal(project=settings.project, run_tags=settings.tags)):
        found.append(f"wandb.project={settings.project} wandb.tags={settings.tags}: {why}; others would work")
    if known_id and (why := _refusal(run_id=known_id[1])):
        path, known = known_id
        found.append(f"{path}: {known}: {why}; without this file the run begins anew in W&B, which would work")
    for key, value in variables.items():
        try:
            wandb.Settings().update_from_env_vars({key: value})
        except Exception as error:  # of pydantic's, W&B's or Python's
            shown = "…" if any(word in key for word in _SECRET) else value
            found.append(f"{key}={shown}: {_reason(error)}; what W&B reads, or unsetting it, would work")
    return found


def _refusal(**settings: Any) -> str | None:
    import wandb

    try:
        wandb.Settings(**settings)
    except Exception as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    """Say in a few words what W&B has against a value."""
    details = getattr(error, "errors", None)
    text = str(details()[0]["msg"] if callable(details) else error).splitlines()[0]
    text = text.removeprefix("Value error, ").rstrip(".")
    text = text if text[1:2].isupper() else text[:1].lower() + text[1:]
    return f"W&B says: {text}" if text else f"W&B says {type(error).__name__}"
