"""One rank of a rerun, started by `deepnarrow rerun`: this file, with a folder where it finds its order as argument."""

import json
import math
import os
import socket
import sys
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

# As in train/pretrain.py: the folder of a script would stand first on the path.
_ROOT = str(Path(__file__).resolve().parent.parent.parent)
if __name__ == "__main__":
    if sys.path[0] == str(Path(__file__).resolve().parent):
        del sys.path[0]
    sys.path.insert(0, _ROOT)

from launch.rerun.verdict import Attempt  # noqa: E402
from model.problems import BadInput  # noqa: E402
from parallel.processes import SUPERVISOR, die_with  # noqa: E402

if TYPE_CHECKING:
    from train.run import Run


@dataclass(frozen=True)
class Order:
    """What a rank is to do.

    Attributes:
        arguments: overrides of the run, with which it ends at the step.
        step: to compute again.
        repeats: how often.
        device: the name of this rank's device.
    """

    arguments: list[str]
    step: int
    repeats: int
    device: str

    def write(self, folder: Path, rank: int) -> None:
        """Write the order where the rank looks for it."""
        (folder / f"order-{rank}.json").write_text(json.dumps(asdict(self)), "utf-8")


def result_of(folder: Path, rank: int) -> dict[str, Any]:
    """Read what a rank has found."""
    return dict(json.loads((folder / f"rank-{rank}.json").read_text("utf-8")))


def main() -> None:
    """Take the steps from the checkpoint on, compute the step several times, and write down what came of it."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    order = Order(**json.loads((folder / f"order-{rank}.json").read_text("utf-8")))
    die_with(os.environ.get(SUPERVISOR))
    from parallel.rendezvous import RankLost, join
    from train.preflight import preflight
    from train.run import leave, open_run
    from train.stopping import StopSignals

    try:
        met = join()
        with StopSignals(lambda code, why: met.fail(code, [why])) as signals:
            try:
                prepared = met.share(lambda: preflight(order.arguments))
                if met.rank == 0:
                    prepared.run_dir.mkdir(parents=True, exist_ok=True)
                run = open_run(prepared, signals, met)
                found = recompute(run, order)
                (folder / f"rank-{rank}.json").write_text(json.dumps(found), "utf-8")
                leave()
            except Exception as error:
                met.fail(1, [f"rank {met.rank} failed: {type(error).__name__}: {error}".splitlines()[0]], said=True)
                raise
            finally:
                met.leave()
    except (BadInput, RankLost) as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None


def recompute(run: "Run", order: Order) -> dict[str, Any]:
    """Take the steps before, then compute a step several times from the same weights. All ranks call it together.

    Returns:
        As JSON: ``replay``, step, loss and norm of each step before; ``attempts``; ``samples``, the first and last
        place of the batch.
    """
    from launch.rerun.notes import Notes
    from parallel.engine import Limits

    replay = []
    for step in range(run.steps_before + 1, order.step):
        if step not in run.passed_steps:
            limits = run.window.limits(run.kind(step))
            result = run.engine.step(run.batches, run.rate(step), run.micro_batches(step), limits)
            run.window.add(result, limits)
            replay.append([step, result.loss, result.grad_norm])
    rate, number = run.rate(order.step), run.micro_batches(order.step)
    batch, notes = list(islice(run.batches, number)), Notes(run.engine)
    attempts = []
    for _ in range(order.repeats):
        notes.begin()
        # No update is made, so that the next attempt has the same weights.
        result = run.engine.step(iter(batch), rate, number, Limits(loss=-math.inf))
        device = f"{order.device} of {socket.gethostname()}"
        attempts.append(asdict(Attempt(run.rank, device, result.loss, result.grad_norm, notes.ended())))
    run.engine.wait()
    return {"replay": replay, "attempts": attempts, "samples": list(run.ends_of_batch(order.step))}


if __name__ == "__main__":
    main()
