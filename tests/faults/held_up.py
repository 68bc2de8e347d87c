"""One rank of a run that things befall, each once: ``python -m tests.faults.held_up FAULTS OVERRIDES``, as JSON."""

import errno
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel import pipeline, zero
from parallel.heartbeat import heart
from train import tracking
from train.checkpoint.folder import CHECKPOINTS, newest_first, step_of
from train.checkpoint.manifest import MANIFEST
from train.checkpoint.storage import Writer
from train.data import batches
from train.pretrain import main

BALLAST = "ballast"


@dataclass(frozen=True)
class Scene:
    """What a fault may touch.

    Attributes:
        run_dir: of the run.
        file: of the corpus.
        arguments: of the function before which the fault happens.
    """

    run_dir: Path
    file: Path | None
    arguments: tuple[Any, ...]


def sleep(scene):
    time.sleep(10**6)


def spin(scene):
    """Compute without end, and let no other thread."""
    while True:
        pass


def fail(scene):
    raise RuntimeError("as the test asks")


def fill(scene):
    """Fill the disk of the run folder, which holds nothing else."""
    block = bytes(2**16)
    with open(scene.run_dir / BALLAST, "wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(block)
        try:
            file.write(b"\0")
        except OSError as error:
            assert error.errno == errno.ENOSPC, error


def remove(scene):
    """Delete the run folder, whatever is being written there."""
    while scene.run_dir.exists():
        shutil.rmtree(scene.run_dir, ignore_errors=True)


def cut(scene):
    """Cut a file of tokens off at its beginning."""
    assert scene.file is not None
    os.truncate(scene.file, min(128, scene.file.stat().st_size // 2))  # a header of NumPy's may stay


def spoil(scene):
    """Make one number of the gradient that is about to be added not a number."""
    bucket, index = scene.arguments
    bucket.slots[index].parameter.grad.view(-1)[3] = math.nan


DONE: dict[str, Callable[[Scene], object]] = {
    "kill": lambda scene: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda scene: os.kill(os.getpid(), signal.SIGSTOP),
    "crash": lambda scene: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": lambda scene: os._exit(7),
    "raise": fail,
    "sleep": sleep,
    "spin": spin,
    "fill": fill,
    "remove": remove,
    "cut": cut,
    "nan": spoil,
}
"""What befalls a rank."""


def largest(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def at_rest(checkpoints: Path) -> bool:
    """Whether there are several checkpoints, and none is being written, which would soon be the newest."""
    return len(newest_first(checkpoints)) > 1 and not list(checkpoints.glob("step-*.tmp"))


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(checkpoint: Path) -> None:
    """Flip one bit in the middle of the largest file: the size stays."""
    with open(largest(checkpoint), "r+b") as file:
        file.seek(largest(checkpoint).stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


BEFORE: dict[str, Callable[[list[Path]], object]] = {
    "damage": lambda whole: halve(largest(whole[0])),
    "flip": lambda whole: flip(whole[0]),
    "tear": lambda whole: halve(whole[0] / MANIFEST),
    "delete": lambda whole: shutil.rmtree(whole[0]),
    "damage all": lambda whole: [flip(checkpoint) for checkpoint in whole],
}
"""What becomes of the checkpoints first, the newest at the head."""

WHERE = {
    "forward": (pipeline._Training, "forward"),
    "backward": (pipeline._Training, "backward"),
    "weights": (pipeline._Training, "weights"),
    "evaluation": (pipeline._Evaluation, "_run_layers"),
    "batch": (batches, "_batch"),
    "reduce": (zero.Zero, "reduce"),
    "update": (zero.Zero, "update"),
    "record": (tracking.Tracker, "step"),
    "write": (Writer, "_write"),
    "gradient": (zero.Bucket, "add"),
}
"""The function of the run before which a fault happens."""


def befall(do, where, step, rank, once, run_dir, file=None, evaluation=False, before=None, lasts=1):
    """Plant a fault.

    Args:
        do: of `DONE`.
        where: of `WHERE`.
        step, rank: when, and to whom.
        once: a file that tells that it is done: when, by `time.monotonic`, and the newest two checkpoints then.
        run_dir, file: see `Scene`.
        evaluation: whether it is done in a validation.
        before: of `BEFORE`, what becomes of checkpoints first; nothing happens until there are two, and no save under
            way.
        lasts: steps that a disk is full for, or in each of which a gradient is not a number.
    """
    owner, name = WHERE[where]
    whole, done, run_dir = getattr(owner, name), [], Path(run_dir)

    def happens() -> bool:
        now = heart._step
        if now < step or (evaluation and not heart._evaluating):
            return False
        if done:
            return do == "nan" and now not in done and now < done[0] + lasts
        return not Path(once).exists() and (not before or at_rest(run_dir / CHECKPOINTS))

    def planted(*arguments, **more):
        if done and do == "fill" and heart._step >= done[0] + lasts:
            (run_dir / BALLAST).unlink(missing_ok=True)
        if happens():
            checkpoints = newest_first(run_dir / CHECKPOINTS)
            if not done:
                Path(once).write_text(json.dumps([time.monotonic(), *map(step_of, checkpoints[:2])]))
            done.append(heart._step)
            if before:
                BEFORE[before](checkpoints)
            DONE[do](Scene(run_dir, Path(file) if file else None, arguments))
        return whole(*arguments, **more)

    if int(os.environ["RANK"]) == rank:
        setattr(owner, name, planted)


if __name__ == "__main__":
    faults, *overrides = sys.argv[1:]
    for fault in json.loads(faults):
        befall(**fault)
    main(overrides)
