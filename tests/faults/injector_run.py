"""A fault in a run on this host that is kept going: how it is planted, how the run is to end, and how it has ended.

In place of DeepSpeed's launcher, ranks are forked from a process that has imported everything (`tests.ranks`); all else
is what `deepnarrow train` runs.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import psutil

from conf.launch_settings import LaunchConfig
from launch.persistence import Persistence
from parallel.layout import Layout
from tests.ranks import nursery
from tests.train.checkpoint import runs
from train.checkpoint import manifest
from train.checkpoint.folder import CHECKPOINTS, name_of, newest_first, step_of
from train.data.cache import META, read_json
from train.data.shards import token_file

LAYOUTS = {
    "pp2": (Layout(1, 2, 1), ["parallel.pp=2"]),
    "dp2": (Layout(2, 1, 1), []),
    "tp2": (Layout(1, 1, 2, True), ["parallel.tp=2"]),
    "dp2 pp2": (Layout(2, 2, 1), ["parallel.pp=2"]),
    "pp2 tp2": (Layout(1, 2, 2, True), ["parallel.pp=2", "parallel.tp=2"]),
    "pp2 interleaved": (
        Layout(1, 2, 1),
        ["parallel.pp=2", "parallel.schedule=interleaved", "parallel.virtual_stages=2"],
    ),
    "pp2 zero_bubble": (Layout(1, 2, 1), ["parallel.pp=2", "parallel.schedule=zero_bubble"]),
}
STALL = 6.0
"""Seconds that a run may stand still."""
WITHIN = STALL + 20.0
"""Seconds from a fault until it is noticed, at most: a stall is told by then, all else within a few steps."""
OVERRIDES = ["checkpoint.every_steps=3", "checkpoint.every_minutes=null"]
DISK = "32m"


@dataclass(frozen=True)
class Ending:
    """How a run is to end that something has befallen.

    Attributes:
        code: its exit code.
        failures: how often it fails; None where the disk has no room to say so.
        said: patterns in what its ranks say, with {run}, {file}, {step}, {newest} and {second} (the newest two
            checkpoints when it happened) to be filled in; by the first the fault is noticed.
        names_rank: whether the first failure is that of the rank that it has befallen.
        weights: ``same`` as without the fault, bit by bit; ``passed over``, as of a run that passes over the step;
            ``saved``, where it does not come to its end: each checkpoint that was there is, and has the right bits;
            ``lost``, where the fault is that all checkpoints are damaged.
    """

    code: int = 0
    failures: int | None = 1
    said: tuple[str, ...] = ()
    names_rank: bool = True
    weights: str = "same"


@dataclass(frozen=True)
class Fault:
    """A fault and what is to come of it.

    Attributes:
        layout: of `LAYOUTS`.
        rank: that it befalls.
        plant: of the arguments of `tests.faults.held_up.befall`.
        ending: of the run.
        more: overrides.
        needs: ``disk``, one of its own; ``cache``, a prepared corpus of its own; ``tokens``, a file of tokens.
    """

    layout: str
    rank: int
    plant: dict = field(default_factory=dict)
    ending: Ending = Ending()
    more: tuple[str, ...] = ()
    needs: str = ""

    def __str__(self) -> str:
        lasts = f" for {self.plant['lasts']} steps" if "lasts" in self.plant else ""
        before = f" after {self.plant['before']}" if "before" in self.plant else ""
        what = f"{self.plant['do']} in {self.plant['where']}{lasts}{before}" + (f", {self.needs}" if self.needs else "")
        return f"{what}: rank {self.rank} of {self.layout}, step {self.plant['step']}"


@dataclass
class Outcome:
    """What came of a fault.

    Attributes:
        code: of the run.
        culprit: the rank and host that were named, or the sentence that names a file or a step.
        cause: of the first failure.
        noticed: seconds from the fault until it was.
        seconds: lost, in parts; none where the run has not been started again.
        wrong: what is not as it should be.
    """

    code: int
    culprit: str = ""
    cause: str = ""
    noticed: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def until_training(self) -> float | None:
        """Seconds from the fault until a step was taken again; None where the run has not been started again."""
        return sum(self.seconds[part] for part in ("noticing", "restarting", "loading")) if self.seconds else None


class NoSignals:
    """Of a run that is told nothing."""

    first = fatal = None


def start_by_fork(faults: list[dict], num: int, folder: Path, left: list[int], look_too: Callable[[], object]):
    """Make what `Persistence.run` starts a run with, once; `look_too` is called whenever it looks.

    The ids of ranks that are there when a start has ended are added to `left`.
    """
    starts = count(1)

    def start(arguments, environment, look) -> int:
        module, before = ("tests.faults.held_up", [json.dumps(faults)]) if faults else (runs.PATIENT, [])
        logs = folder.parent / f"{folder.name}-start-{next(starts)}"
        logs.mkdir()
        ranks = nursery().start(module, num, [*before, *arguments], logs, **environment)
        while None in ranks.codes and not any(ranks.codes):
            if look():
                ranks.signal(signal.SIGKILL)
            look_too()
            time.sleep(0.05)
        look()
        first = next((code for code in ranks.codes if code), 0)
        ranks.wait(1.0)
        left.extend(filter(psutil.pid_exists, ranks.pids))  # at once: the system uses process ids again
        look_too()
        return 128 - first if first < 0 else first

    return start


def run(
    overrides: list[str],
    layout: str,
    folder: Path,
    faults: list[dict],
    settings: LaunchConfig,
    look_too: Callable[[], object] = lambda: None,
) -> tuple[int, list[int]]:
    """Run to the end, kept going; the exit code and the process ids of ranks that a start has left."""
    grid, more = LAYOUTS[layout]
    folder.mkdir(parents=True, exist_ok=True)
    given = [*runs.DEFAULTS, *OVERRIDES, *overrides, *more, f"hydra.run.dir={folder}"]
    given = list({word.partition("=")[0]: word for word in given}.values())  # the last of each key
    left: list[int] = []
    start = start_by_fork(faults, grid.world_size, folder, left, look_too)
    return Persistence(grid, folder, settings, given).run(start, given, NoSignals()), left


def undisturbed_in(home: Path, overrides: list[str]) -> Callable[..., Path]:
    """Make what returns the folder of a run that nothing befalls, of a layout and more overrides: each is run once."""

    @cache
    def undisturbed(layout: str, *more: str) -> Path:
        folder = home / f"undisturbed-{len(list(home.glob('undisturbed-*')))}" / "run"
        assert run([*overrides, *more], layout, folder, [], LaunchConfig(0))[0] == 0
        return folder

    return undisturbed


class Watched:
    """A run that a fault is planted in: what its ranks say of that, and when."""

    def __init__(self, fault: Fault, folder: Path, file: Path | None):
        self.once = folder.parent / f"{folder.name}.done"
        self.seen: str | None = None
        self.after: float | None = None
        self._fault, self._folder, self._file = fault, folder, file

    @property
    def planted(self) -> list | None:
        """When the fault has happened, and the steps of the newest two checkpoints then."""
        return json.loads(self.once.read_text()) if self.once.exists() and self.once.stat().st_size else None

    def look(self) -> None:
        """See whether what is to be said first has been."""
        if self.seen is None and self._fault.ending.said and (planted := self.planted):
            self.seen = self.said(self._fault.ending.said[0])
            self.after = None if self.seen is None else time.monotonic() - planted[0]

    def said(self, pattern: str) -> str | None:
        """Return what a rank has said that a pattern is of."""
        newest, second = [*map(name_of, (self.planted or [0])[1:]), "", ""][:2]
        known = {"run": self._folder, "file": self._file, "step": self._fault.plant["step"]}
        known |= {"newest": newest, "second": int(second.partition("-")[2] or 0)}
        filled = pattern.format(**{name: re.escape(str(one)) for name, one in known.items()})
        for log in sorted(self._folder.parent.glob(f"{self._folder.name}-start-*/rank*.log")):
            if found := re.search(filled, log.read_text(errors="replace")):
                return found[0]
        return None


def inject(
    overrides: list[str], fault: Fault, folder: Path, undisturbed: Callable[..., Path], stall: float = STALL
) -> Outcome:
    """Plant a fault in a run, and say what came of it.

    Args:
        overrides: of the run.
        fault: to be planted.
        folder: for the run; other files are put beside it.
        undisturbed: from `undisturbed_in`.
        stall: seconds that the run may stand still.
    """
    with _place(fault, overrides, folder, undisturbed) as (more, file):
        watched = Watched(fault, folder, file)
        plant = {**fault.plant, "rank": fault.rank, "once": str(watched.once), "run_dir": str(folder)}
        plant |= {"file": str(file)} if file else {}
        passes = [f"train.skip_steps=[{fault.plant['step']}]"] if fault.ending.weights == "passed over" else []
        alone = undisturbed(fault.layout, *(more if fault.needs == "tokens" else []), *fault.more, *passes)
        given = [*overrides, *more, *fault.more]
        code, left = run(given, fault.layout, folder, [plant], LaunchConfig(3, stall), watched.look)
        return judged(fault, code, left, folder, alone, watched)


@contextmanager
def _place(
    fault: Fault, overrides: list[str], folder: Path, undisturbed: Callable[..., Path]
) -> Iterator[tuple[list[str], Path | None]]:
    """Prepare what a fault needs; the overrides that go with it, and the file of tokens that it is about."""
    prepared = Path(dict(word.split("=", 1) for word in overrides if "=" in word)["data.cache_dir"])
    if fault.needs == "disk":
        folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "deepnarrow-faults", str(folder)], check=True)
        try:
            yield [], None
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)  # what kept it going has events.jsonl open
        return
    if fault.needs:
        undisturbed(fault.layout)  # by it, the corpus is prepared
    if fault.needs == "cache":
        own = Path(shutil.copytree(prepared, folder.parent / f"{folder.name}-cache"))
        yield [f"data.cache_dir={own}"], tokens_of(undisturbed(fault.layout), own)
    elif fault.needs == "tokens":
        tokens = tokens_of(undisturbed(fault.layout), prepared)
        file = folder.parent / f"{folder.name}-tokens" / "part.npy"
        file.parent.mkdir(parents=True)
        np.save(file, np.fromfile(tokens, read_json(tokens.parent.parent / META)["dtype"]))
        tokenizer = runs.saved(undisturbed(fault.layout), runs.STEPS) / "tokenizer.json"
        yield ["data=tokens", f"data.path={file.parent}", f"data.tokenizer={tokenizer}"], file
    else:
        yield [], None


def tokens_of(run: Path, cache: Path) -> Path:
    """The first file of the tokens that a run has trained on, in a cache that other corpora may lie in as well."""
    return token_file(cache / manifest.read(newest_first(run / CHECKPOINTS)[0]).data, 0, "train")


def judged(fault: Fault, code: int, left: list[int], folder: Path, undisturbed: Path, watched: Watched) -> Outcome:
    """Compare what came of a fault with what is to come of it."""
    ending, outcome = fault.ending, Outcome(code)
    events, failed = folder / "events.jsonl", []
    if events.exists():
        told = [json.loads(line) for line in events.read_text().splitlines(keepends=True) if line.endswith("\n")]
        failed = [event for event in told if event["event"] == "failed"]
        outcome.seconds = next((event["seconds"] for event in told if event["event"] == "recovered"), {})
    outcome.noticed, outcome.culprit = watched.after, (watched.seen or "").replace(f"{folder.parent}/", "")
    if failed:
        outcome.cause, outcome.noticed = failed[0]["cause"], failed[0]["noticed_after"]
    if ending.names_rank and failed:
        outcome.culprit = f"rank {failed[0]['rank']} on {failed[0]['host']}"
    wrong = {
        f"it ended with code {code}, not {ending.code}": code != ending.code,
        f"it has failed {len(failed)} times, not {ending.failures}": ending.failures not in (None, len(failed)),
        **{f"nothing like {pattern} was said": watched.said(pattern) is None for pattern in ending.said},
        f"{outcome.culprit or 'no rank'} was named": bool(
            ending.names_rank and failed and failed[0]["rank"] != fault.rank
        ),
        f"it was noticed after {outcome.noticed} s, not {WITHIN:g}": outcome.noticed is None
        or outcome.noticed > WITHIN,
        "it has never happened": watched.planted is None,
        f"ranks are left: {left}": bool(left),
    }
    outcome.wrong = [text for text, so in wrong.items() if so]
    if not outcome.wrong:
        outcome.wrong = _wrong_weights(fault, folder, undisturbed, watched)
    return outcome


def _wrong_weights(fault: Fault, folder: Path, undisturbed: Path, watched: Watched) -> list[str]:
    """Compare the checkpoints and the records with those of the undisturbed run."""
    if fault.ending.weights == "lost":
        return []
    if fault.ending.weights == "saved":
        there = newest_first(folder / CHECKPOINTS)
        whens = (watched.planted or [0])[1:]
        absent = [f"the checkpoint of step {step} is lost" for step in whens if step not in map(step_of, there)]
        others = [path for path in there if runs.digests(path) != runs.digests(undisturbed / CHECKPOINTS / path.name)]
        return absent + [f"{path.name} is another than without the fault" for path in others]
    wrong = []
    if runs.digests(runs.saved(folder, runs.STEPS)) != runs.digests(runs.saved(undisturbed, runs.STEPS)):
        wrong.append("the weights at the end are others")
    curves = [runs.curve(where) for where in (folder, undisturbed)]
    if fault.ending.weights == "passed over":
        curves = [{step: one for step, one in curve.items() if step != fault.plant["step"]} for curve in curves]
    return wrong + (["the records are others"] if curves[0] != curves[1] else [])


def can_mount() -> bool:
    """Tell whether this process may make a disk of its own, in memory."""
    return os.geteuid() == 0 and shutil.which("mount") is not None
