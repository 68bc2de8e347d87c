"""One rank of a run that things befall, each once: ``python -m tests.faults.held_up FAULTS OVERRIDES``, as JSON."""

import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from parallel import pipeline, zero
from parallel.heartbeat import heart
from train import tracking
from train.checkpoint.folder import newest_first
from train.checkpoint.storage import Writer
from train.data import batches
from train.pretrain import main


def sleep():
    time.sleep(10**6)


def spin():
    """Compute without end, and let no other thread."""
    while True:
        pass


def fail():
    raise RuntimeError("as the test asks")


def damage(checkpoints):
    """Lose half of a file of the newest checkpoint."""
    largest = max(newest_first(checkpoints)[0].glob("*.safetensors"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def delete(checkpoints):
    shutil.rmtree(newest_first(checkpoints)[0])


DONE = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": lambda: os._exit(7),
    "raise": fail,
    "sleep": sleep,
    "spin": spin,
}
"""What befalls a rank."""


def befall(do, where, step, rank, once, evaluation=False, before=None, checkpoints=None):
    """Plant a fault.

    Args:
        do: of `DONE`.
        where: a function of the run before which it is done.
        step, rank: when, and to whom.
        once: a file that tells that it is done.
        evaluation: whether it is one of a validation.
        before: what becomes of the newest checkpoint first: damage, delete.
        checkpoints: where that is.
    """
    owner, name = {
        "forward": (pipeline._Training, "forward"),
        "backward": (pipeline._Training, "backward"),
        "weights": (pipeline._Training, "weights"),
        "evaluation": (pipeline._Evaluation, "_run_layers"),
        "batch": (batches, "_batch"),
        "reduce": (zero.Zero, "reduce"),
        "update": (zero.Zero, "update"),
        "record": (tracking.Tracker, "step"),
        "write": (Writer, "_write"),
        "gradients": (zero.Zero, "reduce"),
    }[where]
    whole = getattr(owner, name)

    def planted(*arguments, **more):
        here = heart._step >= step and (not evaluation or heart._evaluating)
        here = here and (not before or len(newest_first(Path(checkpoints))) > 1)  # the one before is to be gone on from
        if here and not Path(once).exists():
            Path(once).write_text(str(time.monotonic()))
            if before:
                {"damage": damage, "delete": delete}[before](Path(checkpoints))
            if do == "nan":
                return whole(*arguments, **more) * math.nan
            DONE[do]()
        return whole(*arguments, **more)

    if int(os.environ["RANK"]) == rank:
        setattr(owner, name, planted)


if __name__ == "__main__":
    faults, *overrides = sys.argv[1:]
    for fault in json.loads(faults):
        befall(**fault)
    main(overrides)
