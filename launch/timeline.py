"""The timelines that a run has kept, drawn."""

import argparse
import json
from pathlib import Path

from conf.errors import BadInput
from train.timeline import Measured, draw


def run(options: argparse.Namespace) -> int:
    """Draw one step of a run folder, and say what it shows.

    Raises:
        BadInput: no such step is kept, or the picture is of no kind that can be drawn.
    """
    run_dir = Path(options.source)
    kept = {int(path.stem.removeprefix("step-")): path for path in sorted(run_dir.glob("timelines/step-*.json"))}
    if not kept:
        works = "a run with parallel.pp above 1 keeps those of train.timeline_at"
        raise BadInput([f"{run_dir}: no timeline is there; {works}"])
    step = max(kept) if options.step is None else options.step
    if step not in kept:
        raise BadInput([f"--step={step}: not kept; there are {', '.join(map(str, kept))}"])
    out = Path(options.out) if options.out else run_dir / f"timeline-{step}.svg"
    if out.suffix not in (".png", ".svg"):
        raise BadInput([f"--out={out}: its end says what is drawn; {out.with_suffix('.svg')} or .png would work"])
    measured = Measured.from_json(json.loads(kept[step].read_text("utf-8")))
    try:
        draw(measured, out)
    except OSError as error:
        raise BadInput([f"--out={out}: {error.strerror}"]) from None
    print(
        f"{out}: step {step}, {measured.schedule.value}, {measured.micro_batches} micro-batches on "
        f"{measured.place.num_ranks} ranks: bubble {measured.bubble:.1%}, "
        f"{measured.ideal().bubble:.1%} without waiting for messages"
    )
    return 0
