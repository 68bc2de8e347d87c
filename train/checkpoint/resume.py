"""Resuming from a checkpoint: which one, whether it fits, and how each rank loads its part of it."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from conf.mixtures import length_problems
from conf.paths import checked
from conf.schema import Config, recipe_fields, to_jsonable
from conf.validate import range_problems
from model.problems import BadInput, either
from model.weights import StoredWeights
from parallel.state import OptimizerState
from train.checkpoint import history, manifest
from train.checkpoint.folder import CHECKPOINTS, LATEST, below, mark_damaged, newest_first, step_of
from train.checkpoint.manifest import Damaged, Manifest
from train.checkpoint.storage import LoadPieces, Reader
from train.health import all_finite
from train.length import length_of

log = logging.getLogger(__name__)

AUTO, NEVER = "auto", "never"
_MAY_DIFFER = ("model.attention", "model.init_std")
"""Of the model: how it is computed, and how it began."""


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from.

    Attributes:
        candidates: checkpoints to begin from, the best first; none for a run from the beginning.
        own: whether they are the run folder's, whose metrics and W&B run then go on.
        rewind: whether the run folder holds later ones that the run is told to go back behind.
        origin: the checkpoint elsewhere that the run was told to begin from.
    """

    candidates: tuple[Path, ...] = ()
    own: bool = False
    rewind: bool = False
    origin: str | None = None


def find(resume: str, run_dir: Path) -> Start:
    """Find the checkpoints that `resume` names; nothing is checked but that they are there.

    Raises:
        BadInput: the path holds no checkpoint.
    """
    own = newest_first(run_dir / CHECKPOINTS)
    if resume == NEVER:
        return Start()
    if resume == AUTO:
        return Start(tuple(own), own=bool(own), origin=origin_of(own))
    named = checked("resume", resume).absolute()
    if named.name == LATEST:
        named = named.resolve()
    if own and origin_of(own) == str(named):  # the same command again: it began there, and has come further
        return Start(tuple(own), own=True, origin=str(named))
    found = [named] if step_of(named) is not None and named.is_dir() else below(named)
    if not found:
        near = newest_first(named.parent) if step_of(named) is not None else []
        hint = " or ".join(f"resume={path}" for path in near[:2]) or "a folder step-… or a run folder that has some"
        raise BadInput([f"resume={resume}: no checkpoint is there; {hint} would work, or resume=never"])
    inside = found[0].resolve().parent == (run_dir / CHECKPOINTS).resolve()
    return Start(tuple(found), own=inside, rewind=inside and found[0].name != own[0].name, origin=str(named))


def check(config: Config, start: Start, tokenizer: Path | None = None) -> list[str]:
    """Say why the run cannot resume from the newest checkpoint that can be read, a sentence each.

    Args:
        config: of the run.
        start: from `find`.
        tokenizer: tokenizer.json of the run's data, if it is prepared already.
    """
    reasons = []
    for path in start.candidates:
        try:
            found = manifest.read(path)
        except Damaged as error:
            reasons.append(f"{path.name}: {error}")
            continue
        if not any("/" in name for name in found.tensors):
            return [f"resume={config.resume}: {path} holds weights alone; init_from={path} would begin with them"]
        problems = _differences(config, path, found) + _other_tokenizer(config, path, found, tokenizer)
        if not range_problems(config):
            problems += history.problems(config, found, _earlier(path))
        return problems or _past_the_end(config, path, found, start)
    return [_none_is_sound(config, start, reasons)] if reasons else []


def _earlier(path: Path) -> Iterator[tuple[Path, Manifest]]:
    """Yield the checkpoints beside one that are of earlier steps and can be read, newest first."""
    behind = [one for one in newest_first(path.parent) if (step_of(one) or 0) < (step_of(path) or 0)]
    for one in behind:
        with suppress(Damaged, BadInput):
            yield one, manifest.read(one)


def newest(start: Start) -> Manifest | None:
    """Read the manifest of the checkpoint that a run goes on from; None where there is none that can be read."""
    for path in start.candidates:
        try:
            return manifest.read(path)
        except Damaged:
            continue
    return None


def warnings(config: Config, found: Manifest, data: str) -> list[str]:
    """Warn of what a resumed run has changed and may not have meant to, in one sentence each."""
    now, then = recipe_fields(to_jsonable(asdict(config))), recipe_fields(found.config)
    changed = [key for key in now if now[key] != then.get(key) and key not in _MAY_DIFFER]
    lines = [f"{key}={now[key]}: the run had {then.get(key)} up to step {found.step}" for key in changed]
    sigmas = config.train.spike_sigmas
    if sigmas is not None and "spike_sigmas" not in found.config["train"]:
        lines.append(f"train.spike_sigmas={sigmas:g}: up to step {found.step} no update was skipped as a spike")
    if data != found.data and not any(key.startswith("data.") for key in changed):
        lines.append(
            "the corpus is not prepared as it was, since its files have changed or this version reads them otherwise: "
            "the order of samples may be another from here on"
        )
    return lines


def trained_with_document_mask(start: Start) -> tuple[bool, str | None]:
    """Tell what `data.document_mask=null` is: true, but where a checkpoint says or implies false; then also a warning.

    Args:
        start: from `find`.
    """
    found = newest(start)
    if found is None or recipe_fields(found.config)["data.document_mask"] is not False:
        return True, None
    return False, (
        f"data.document_mask=null: false, as the run was trained up to step {found.step:,}, so that documents of a "
        f"sequence see each other; data.document_mask=true resume={start.candidates[0]} would separate them from here "
        "on"
    )


def load_newest_sound(config: Config, start: Start, state: OptimizerState, group: dist.ProcessGroup) -> Manifest | None:
    """Load the optimizer's state and the stages' weights from the first candidate that is sound; return its manifest.

    Every rank checks its share of the files, and whether what it loads is finite. A checkpoint of the run's own folder
    that is not sound is renamed, with a warning, so that it is not tried again. All ranks call it together.

    Args:
        config: of the run.
        start: the same on every rank.
        state: of an engine that has taken no step.
        group: a gloo group of all ranks.

    Raises:
        BadInput: on every rank: none is sound, or it is another model's.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    reasons = []
    for path in start.candidates:
        damage, found = None, None
        try:
            found = manifest.read(path)
            manifest.check_files(path, found, sorted(found.files)[rank::size])
        except Damaged as error:
            damage = str(error)
        answers: list[Any] = [None] * size
        dist.all_gather_object(answers, damage, group)
        damage = next((answer for answer in answers if answer), None)
        if damage is None and found is not None:
            if problems := _differences(config, path, found):
                raise BadInput(problems)
            finite: list[Any] = [None] * size
            dist.all_gather_object(finite, _load(state, path, found.tensors, found.adam_step, group), group)
            if all(finite):
                return found
            reasons.append(f"{path.name}: its state is not finite")
            if rank == 0 and start.own:
                aside = mark_damaged(path, "diverged").name
                log.warning("%s holds numbers that are not finite: set aside as %s", path, aside)
            continue
        reasons.append(f"{path.name}: {damage}")
        if rank == 0 and start.own:
            log.warning("%s is damaged (%s): set aside as %s", path, damage, mark_damaged(path).name)
    if reasons:
        raise BadInput([_none_is_sound(config, start, reasons)])
    return None


def load_weights(state: OptimizerState, weights: StoredWeights, group: dist.ProcessGroup) -> None:
    """Load weights to begin with; every rank reads its part of them. All ranks call it together.

    Args:
        state: of an engine of the same shape that has taken no step; its moments are zero.
        weights: in any dtype.
        group: a gloo group of all ranks.
    """
    _load(state, weights.folder, weights.tensors, 0, group)


def _load(
    state: OptimizerState, folder: Path, tensors: Mapping[str, Any], adam_step: int, group: dist.ProcessGroup
) -> bool:
    """Read this rank's part of a state; tell whether it is finite."""
    state.start_at(adam_step)
    on_device = state.flats()
    on_host = [{key: flat.cpu() for key, flat in flats.items()} for flats in on_device]  # on the CPU, no copy
    pieces: dict[str, Any] = {
        name: piece for name, piece in state.pieces(on_host).items() if name in tensors or adam_step
    }
    dcp.load(pieces, storage_reader=Reader(folder, tensors), planner=LoadPieces(), process_group=group)
    for flats, read in zip(on_device, on_host, strict=True):
        for key, flat in flats.items():
            flat.copy_(read[key])
    state.start_gather()
    return all_finite(flat for flats in on_host for flat in flats.values())


def _differences(config: Config, path: Path, found: Manifest) -> list[str]:
    now = to_jsonable(asdict(config))
    then = found.config
    keys = [f"model.{key}" for key in now["model"]]
    problems = []
    for key in keys:
        section, _, name = key.partition(".")
        here, there = now[section][name], then[section].get(name)
        if here != there and key not in _MAY_DIFFER:
            here, there = ("null" if value is None else value for value in (here, there))
            problems.append(f"{key}={here}: the checkpoint {path} has {there}; {key}={there} would work{_OR_ELSE}")
    return problems


def _other_tokenizer(config: Config, path: Path, found: Manifest, tokenizer: Path | None) -> list[str]:
    if tokenizer is None or manifest.checksum(tokenizer) == found.files[tokenizer.name]["sha256"]:
        return []
    works = f"data.tokenizer={path / tokenizer.name}"
    return [f"data.tokenizer={config.data.tokenizer or 'null'}: not the checkpoint's; {works} would work{_OR_ELSE}"]


def _past_the_end(config: Config, path: Path, found: Manifest, start: Start) -> list[str]:
    """Whether nothing is left to train after a checkpoint that the run is told to begin from."""
    if length_problems(config):
        return []
    length = length_of(config, history.begun(config, found))
    if (start.own and not start.rewind) or found.step < length.steps:
        return []
    longer = "train.max_steps" if length.steps < length.schedule_steps else "train.total_tokens"
    return [f"resume={config.resume}: {path} is of step {found.step:,} and the run ends with step {length.steps:,}, so "
            f"that nothing is left to train; a higher {longer} would work, or init_from={path} to begin with its "
            "weights"]  # fmt: skip


_OR_ELSE = ", or resume=never to start again"


def _none_is_sound(config: Config, start: Start, reasons: list[str]) -> str:
    where = start.candidates[0].parent if len(start.candidates) > 1 else start.candidates[0]
    others = [] if start.own else [path for path in newest_first(where.parent) if path not in start.candidates]
    works = either("resume", others[:2]) if others else "resume=never"
    return f"resume={config.resume}: no sound checkpoint in {where} ({'; '.join(reasons)}); {works} would start"


def origin_of(own: list[Path]) -> str | None:
    """Read from the newest readable checkpoint of a run what that run was told to begin from."""
    for path in own:
        try:
            return manifest.read(path).origin
        except Damaged:
            continue
    return None
