"""A run folder, read: its settings and facts, records, events and checkpoints, while the run may be writing them.

Nothing that a folder holds is an error here: what is torn, damaged or of an older format is left out and said in
`RunFolder.faults`. Checkpoints are never read, but for the first lines of a manifest; of long files heads and tails are
read unless all records are asked for.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from launch.columns import Columns, chunks
from train.checkpoint.folder import CHECKPOINTS, step_of
from train.checkpoint.manifest import MANIFEST
from train.events import EVENTS
from train.records import METRICS, SKIPPED, SUMMARY, records
from train.started import STARTED
from train.strict_json import with_nan
from train.wandb_run import kept_id

MARKS = (STARTED, METRICS, SUMMARY, ".hydra")
"""What a folder has one of that is a run's."""
LATE = 64
"""Records by which it is told how a run is of late."""
_TAIL = 2**16
"""Bytes of a file's end that are read for them."""
_LOOK_BACK = 2**20
"""Bytes of its end in which the last validation is looked for."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, by its name alone.

    Attributes:
        path: its folder.
        step: of the run.
        kind: empty for one that can be resumed from, ``damaged`` or ``diverged`` for one that is set aside.
        written: when its folder was last changed, in seconds since 1970 by the disk's clock.
    """

    path: Path
    step: int
    kind: str
    written: float


class RunFolder:
    """What a run has left in its folder so far. Everything is read when it is first asked for, and then kept.

    Attributes:
        path: the folder.
        name: the last part of its path.
        faults: what could not be read, a sentence each; it grows as things are read.

    Args:
        path: a folder that `is_run` is true of, or any other: then there is nothing in it.
    """

    def __init__(self, path: Path):
        self.path, self.name = path, path.absolute().name
        self.faults: list[str] = []

    @cached_property
    def started(self) -> dict[str, Any]:
        """The note of the last start (`train.started`); empty where there is none: in runs from before it was kept."""
        return self._object(STARTED)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json, which a run that has come to its end has; else empty."""
        return self._object(SUMMARY)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The settings, nested, as they were composed: of .hydra/config.yaml, or else of the newest checkpoint."""
        from conf.schema import register  # takes a second, and is not needed to list runs

        path = self.path / ".hydra" / "config.yaml"
        try:
            loaded = OmegaConf.load(path)
            register()
            try:
                found = OmegaConf.to_container(loaded, resolve=True)
            except OmegaConfBaseException:  # a variable of the environment that is set there, and not here
                found = OmegaConf.to_container(loaded, resolve=False)
            if isinstance(found, dict) and found:
                return {str(key): value for key, value in found.items()}
            self._fault(path, "holds no settings")
        except FileNotFoundError:
            pass
        except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
            self._fault(path, str(error).splitlines()[0])
        return dict(self.manifest.get("config") or {})

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What else identifies the run: ``layout``, ``code``, ``device``, ``precision``, ``parameters``, ``steps``.

        A run from before these were noted has ``layout`` and ``code``, of its newest checkpoint.
        """
        facts = {key: value for key, value in self.started.items() if value is not None}
        if "code" not in facts:
            facts |= {key: self.manifest[key] for key in ("layout", "code") if key in self.manifest}
        return facts

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The first keys of the newest checkpoint's manifest, up to its tensors; empty where there is none."""
        sound = [one for one in self.checkpoints if not one.kind]
        path = sound[0].path / MANIFEST if sound else None
        found: dict[str, Any] = {}
        if path is not None:
            try:
                with open(path, encoding="utf-8", errors="replace") as lines:
                    for line in lines:  # a key a line
                        if line.startswith('"tensors"'):
                            break
                        if line.startswith('"'):
                            found |= json.loads("{" + line.rstrip().removesuffix(",") + "}")
            except (OSError, ValueError) as error:
                self._fault(path, str(error))
        return found

    @cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints, newest first, those among them that are set aside; what is being written is left out."""
        found = []
        try:
            with os.scandir(self.path / CHECKPOINTS) as entries:
                for entry in entries:
                    whole, _, kind = entry.name.partition(".")
                    step = step_of(Path(whole))
                    if step is not None and kind != "tmp" and not entry.is_symlink():
                        with suppress(FileNotFoundError):  # the run has just removed it
                            written = entry.stat().st_mtime
                            found.append(Checkpoint(Path(entry.path), step, kind.rstrip("0123456789"), written))
        except FileNotFoundError:
            pass
        except OSError as error:
            self._fault(self.path / CHECKPOINTS, str(error.strerror))
        return sorted(found, key=lambda one: (one.step, not one.kind), reverse=True)

    @cached_property
    def first(self) -> dict[str, Any] | None:
        """The first record of metrics.jsonl; None where there is none."""
        return next(iter(self._parsed(self._lines(0, _TAIL)[:LATE])), None)

    @cached_property
    def last(self) -> dict[str, Any] | None:
        """The last record of metrics.jsonl; None where there is none."""
        return self.tail[-1] if self.tail else None

    @cached_property
    def tail(self) -> list[dict[str, Any]]:
        """The last records of metrics.jsonl, `LATE` of them at most."""
        found = self._parsed(self._lines(-_TAIL, _TAIL)[-LATE:])
        return found or self._parsed(self._lines(-_LOOK_BACK, _LOOK_BACK)[-LATE:])

    @cached_property
    def val_loss(self) -> float | None:
        """The validation loss last measured, in nats; None where none was, or none lately."""
        if self.summary:
            of_end = self.summary.get("val_loss")
            return float(of_end) if isinstance(of_end, int | float) else None
        for size in (_TAIL, _LOOK_BACK):
            validated = [line for line in self._lines(-size, size) if b'"val_loss"' in line]
            for record in reversed(self._parsed(validated)):
                if isinstance(value := record.get("val_loss"), int | float):
                    return float(value)
        return None

    @property
    def changed(self) -> float | None:
        """When metrics.jsonl was last written to, in seconds since 1970 by the disk's clock; None where it is not."""
        return self.modified(METRICS)

    def modified(self, name: str) -> float | None:
        """Return when a file of the folder was last written to, in seconds since 1970; None where it is not there."""
        try:
            return (self.path / name).stat().st_mtime
        except OSError:
            return None

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """The events of the command that keeps the run going, in their order: `failed`, `recovered`, and others."""
        return [one for one in records(self.path / EVENTS) if isinstance(one, dict)]

    @cached_property
    def skipped(self) -> list[dict[str, Any]]:
        """The steps whose updates were skipped, in their order (skipped.jsonl)."""
        return [one for one in records(self.path / SKIPPED) if isinstance(one, dict)]

    @cached_property
    def wandb(self) -> dict[str, Any]:
        """Where W&B has the run: ``mode``, ``dir``, ``id``, ``url``, as far as they are known."""
        if isinstance(logged := self.summary.get("wandb"), dict):
            return logged
        kept = kept_id(self.path)
        return {"dir": str(self.path / "wandb"), "id": kept[1]} if kept else {}

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield all records of metrics.jsonl, with NaN for figures that were not finite."""
        for record in records(self.path / METRICS):
            if isinstance(record, dict):
                yield with_nan(record)

    def columns(self, *names: str) -> dict[str, NDArray[np.float64]]:
        """Read single figures of all records: an array of float64 for each name, all of one length.

        It takes two seconds for a million records. A figure that a record does not have, or that was not finite, is
        NaN.

        Args:
            names: keys of records whose values are numbers, such as loss and tokens.
        """
        read = [*self._chunks(names)]
        empty: NDArray[np.float64] = np.empty(0)
        return {name: np.concatenate([empty, *(columns[name,] for columns in read)]) for name in names}

    def chunks(self, *names: str) -> Iterator[Columns]:
        """Read figures of all records, some ten thousand records at a time: all of a million take five seconds.

        Args:
            names: keys of records whose values are numbers; all figures where none is given.

        Yields:
            An array of float64 for each figure, such as ``("loss",)`` or ``("wait_seconds", "0")``, that some record of
            the chunk has; NaN where a record has none or it was not finite.
        """
        return self._chunks(names or None)

    def _chunks(self, names: Sequence[str] | None) -> Iterator[Columns]:
        for columns, torn in chunks(self.path / METRICS, names):
            self._fault_of_lines(torn)
            yield columns

    def _lines(self, start: int, num_bytes: int) -> list[bytes]:
        """Read the whole lines in a part of metrics.jsonl; a negative start counts from its end."""
        try:
            with open(self.path / METRICS, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                at = start if start >= 0 else max(0, size + start)
                part = os.pread(file.fileno(), num_bytes, at)
        except FileNotFoundError:
            return []
        except OSError as error:
            self._fault(self.path / METRICS, str(error.strerror))
            return []
        return part.split(b"\n")[1 if at else 0 : -1]  # the first may have begun before, the last is not ended

    def _parsed(self, lines: Sequence[bytes]) -> list[dict[str, Any]]:
        found, torn = [], 0
        for line in lines:
            try:
                record = json.loads(line)
                found.append(with_nan(record))
            except (ValueError, AttributeError, TypeError, RecursionError):
                torn += 1
        self._fault_of_lines(torn)
        return found

    def _fault_of_lines(self, torn: int) -> None:
        if torn:
            self._fault(self.path / METRICS, "some of its lines are no records")

    def _object(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            found = json.loads(path.read_bytes())
            if isinstance(found, dict):
                return found
            self._fault(path, "holds no object")
        except FileNotFoundError:
            pass
        except OSError as error:
            self._fault(path, str(error.strerror))
        except (ValueError, RecursionError):
            self._fault(path, "is no JSON, or not whole")
        return {}

    def _fault(self, path: Path, what: str) -> None:
        text = f"{path.relative_to(self.path)}: {what}"
        if text not in self.faults:
            self.faults.append(text)


def is_run(path: Path) -> bool:
    """Tell whether a folder is a run's."""
    return any((path / mark).exists() for mark in MARKS)


def shown_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Flatten settings to be shown: of the alerts' command the program alone, its arguments may be somebody's key."""
    found = flat(config)
    if command := found.get("alerts.command"):
        words = command.split() if isinstance(command, str) else command
        found["alerts.command"] = f"{words[0]} …" if isinstance(words, list) and words else "…"
    return found


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted keys, as ``optimizer.lr``; an empty dictionary stays one."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def found_below(folders: Sequence[Path]) -> list[Path]:
    """Find the run folders in folders, which may be such themselves, in the order of their paths.

    Nothing below a run folder is looked at, and no file is opened.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def look(folder: Path) -> None:
        try:
            key = os.stat(folder)
            with os.scandir(folder) as entries:
                names = {entry.name: entry for entry in entries}
            if (key.st_dev, key.st_ino) in seen:  # a link into itself
                return
            seen.add((key.st_dev, key.st_ino))
        except OSError:
            return
        if any(mark in names for mark in MARKS):
            found.append(folder)
            return
        for name in sorted(names):
            if not name.startswith(".") and names[name].is_dir():
                look(folder / name)

    for folder in folders:
        look(folder)
    return found
