"""Asynchronous checkpoints: the state is copied to host memory, and a thread writes it while training goes on."""

import hashlib
import logging
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from conf.train_settings import CheckpointConfig
from parallel.state import Flats, OptimizerState
from train.checkpoint import folder, manifest
from train.checkpoint.host_memory import host_buffer
from train.checkpoint.manifest import Manifest
from train.checkpoint.storage import NotFinite, SavePieces, Writer
from train.data.tokenizer import config_file
from train.files import sync

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The result of a save.

    Attributes:
        step: that was saved.
        path: the checkpoint.
        blocked: seconds that training stood still.
        seconds: from the start until it was on disk.
        num_bytes: on disk, over all ranks; known on rank 0.
        error: why it failed, in a line; None where it is on disk.
        finite: whether the state was; one that is not is never on disk. The same on every rank.
    """

    step: int
    path: Path
    blocked: float
    seconds: float
    num_bytes: int
    error: str | None
    finite: bool = True


class Saver:
    """Writes checkpoints, one at a time. All ranks make one and call `save` together.

    Host memory: a copy of what this rank's ZeRO-1 part holds, 12 bytes per parameter over dp, allocated at the first
    save and used again for every later one.

    Args:
        state: what is saved.
        checkpoints: the run's folder of checkpoints, the same on every rank, on a file system that all share.
        settings: when to save and what to keep.
        facts: what else the manifest says: data, config, layout, code and origin.
        tokenizer: tokenizer.json, which goes into every checkpoint.
        group: a gloo group of all ranks that nothing else uses while a save is under way.
    """

    def __init__(
        self,
        state: OptimizerState,
        checkpoints: Path,
        settings: CheckpointConfig,
        facts: dict[str, Any],
        tokenizer: Path,
        group: dist.ProcessGroup,
    ):
        self._state, self._folder, self._settings, self._facts = state, checkpoints, settings, facts
        # Read once: a save must not depend on files that others may clear away. The second, where there is one, says
        # which token ends a document.
        files = [file for file in (tokenizer, config_file(tokenizer)) if file.exists()]
        self._tokenizer, self._group = {file.name: file.read_bytes() for file in files}, group
        self._rank = dist.get_rank()
        self._copies: Flats = []
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._last_begin = time.monotonic()
        self._wanted = False

    def want(self) -> None:
        """Make a save due after the next step, whatever the settings say of steps and time."""
        self._wanted = True

    def due(self, step: int) -> bool:
        """Tell whether the settings ask for a save after this step; by time, once the one before is done."""
        by_steps, minutes = self._settings.every_steps, self._settings.every_minutes
        if not self._settings.enabled:
            return False
        late = minutes is not None and time.monotonic() - self._last_begin >= 60 * minutes
        return self._wanted or bool(by_steps and step % by_steps == 0) or (late and not self.busy)

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing a checkpoint."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, *, tokens: int, history: dict[str, Any] | None = None) -> None:
        """Copy the state after `step`, and write it in the background. The save before has been waited for.

        Args:
            step: optimizer steps taken.
            tokens: trained on so far.
            history: of what they were, see `train.checkpoint.history`; None where nothing goes on from the checkpoint.
        """
        assert self._thread is None
        self._wanted = False
        begin = self._last_begin = time.monotonic()
        self._copy(self._state.flats())
        path = self._folder / folder.name_of(step)
        written = datetime.now().astimezone().isoformat(timespec="seconds")
        taken = {"step": step, "adam_step": self._state.adam_step, "tokens": tokens, "history": history}
        facts = {**taken, "written": written, **self._facts}
        blocked = time.monotonic() - begin
        # Not waited for when the process ends: a second signal, or a failure elsewhere, must be able to end it.
        self._thread = threading.Thread(target=self._write, args=(path, facts, begin, blocked), daemon=True)
        self._thread.start()

    def wait(self) -> Outcome | None:
        """Wait for the save under way and return its outcome; None where that is known already or there is none."""
        if self._thread is not None:
            self._thread.join()
        return self.news()

    def news(self) -> Outcome | None:
        """Return the outcome of a save that has ended since this was last asked, or None."""
        if self.busy:
            return None
        self._thread, (outcome, self._outcome) = None, (self._outcome, None)
        return outcome

    def _copy(self, flats: Flats) -> None:
        if not self._copies:
            self._copies = [{key: host_buffer(flat) for key, flat in group.items()} for group in flats]
        for copies, group in zip(self._copies, flats, strict=True):
            for key, flat in group.items():
                copies[key].copy_(flat, non_blocking=True)
        if flats[0][next(iter(flats[0]))].is_cuda:
            torch.cuda.synchronize()

    def _write(self, path: Path, facts: dict[str, Any], begin: float, blocked: float) -> None:
        unfinished, size, error, finite = folder.temporary(path), 0, None, True

        def commit(tensors: dict[str, Any], files: dict[str, Any]) -> None:
            nonlocal size
            size = self._commit(path, Manifest(tensors=tensors, files=files, **facts))

        try:
            writer = Writer(unfinished, self._rank, commit)
            pieces: dict[str, Any] = dict(self._state.pieces(self._copies))
            dcp.save(pieces, storage_writer=writer, planner=SavePieces(), process_group=self._group)
        except BaseException as failure:  # training goes on, whatever it is; what DCP raises is no Exception
            error, finite = _in_a_line(failure), not _is_of_the_state(failure)
            if self._rank == 0:
                folder.remove(unfinished)
        self._outcome = Outcome(facts["step"], path, blocked, time.monotonic() - begin, size, error, finite)

    def _commit(self, path: Path, described: Manifest) -> int:
        """Rename a checkpoint that all ranks have written from its temporary name, on one rank; its size in bytes."""
        unfinished = folder.temporary(path)
        for name, content in self._tokenizer.items():
            (unfinished / name).write_bytes(content)
            sync(unfinished / name)
            described.files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if absent := [name for name in described.files if not (unfinished / name).exists()]:
            raise FileNotFoundError(f"{absent[0]} is not in {unfinished}: all machines must share the run folder")
        manifest.write(unfinished, described)
        sync(unfinished)
        unfinished.rename(path)
        sync(path.parent)
        sync(path.parent.parent)
        try:
            folder.point_at(path)
            folder.prune(path.parent, self._settings.keep_last, self._settings.keep_every)
        except OSError as error:  # the checkpoint is there all the same
            log.warning("%s is saved, but tidying up beside it failed: %s", path, error)
        return described.num_bytes


def _is_of_the_state(failure: BaseException) -> bool:
    """Tell whether a save failed on any rank for what was to be saved, and not for the disk."""
    failures = failure.failures.values() if isinstance(failure, dcp.CheckpointException) else []
    return any(isinstance(cause, NotFinite) for cause, _ in failures)


def _in_a_line(failure: BaseException) -> str:
    """Reduce DCP's failures by rank, with a traceback each, to the first one's reason."""
    if isinstance(failure, dcp.CheckpointException):
        rank, (cause, _) = next(iter(failure.failures.items()))
        return f"{type(cause).__name__} on rank {rank}: {cause}"
    return f"{type(failure).__name__}: {failure}"
