"""Pictures of the timelines that a run has saved (`deepnarrow timeline`)."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.problems import BadInput
from train.timeline import draw, read, written


@contextmanager
def picture(option: str, path: Path) -> Iterator[None]:
    """Report errors of drawing a picture inside this context as errors of a command's option.

    Raises:
        BadInput: the file's suffix is not one that can be drawn, or the file cannot be written.
    """
    if path.suffix not in (".png", ".svg"):
        raise BadInput([f"{option}={path}: its end says what is drawn; {path.with_suffix('.svg')} or .png would work"])
    try:
        yield
    except OSError as error:
        raise BadInput([f"{option}={path}: {error.strerror}"]) from None


def run(options: argparse.Namespace) -> int:
    """Draw one step of a run folder, and print its bubble.

    Raises:
        BadInput: the step has no saved timeline, or the picture cannot be drawn.
    """
    run_dir = Path(options.source)
    found = written(run_dir)
    if not found:
        works = "a run with parallel.pp above 1 keeps those of train.timeline_at"
        raise BadInput([f"{run_dir}: no timeline is there; {works}"])
    step = max(found) if options.step is None else options.step
    if step not in found:
        raise BadInput([f"--step={step}: not kept; there are {', '.join(map(str, found))}"])
    out = Path(options.out) if options.out else run_dir / f"timeline-{step}.svg"
    with picture("--out", out):
        measured = read(found[step])
        draw(measured, out)
    print(
        f"{out}: step {step}, {measured.schedule.value}, {measured.micro_batches} micro-batches on "
        f"{measured.placement.num_ranks} ranks: bubble {measured.bubble:.1%}, "
        f"{measured.ideal().bubble:.1%} without waiting for messages"
    )
    return 0
