"""Faults planted in runs that are kept going: ``python -m tests.faults.injector [--only WORD] [--json FILE]``.

Each is noticed, its rank, host or file is named, nothing is left behind, and the run goes on by itself and ends with
the bits of a run that nothing befell; or, where no restart can mend it, with the exit code and the sentence that are
promised, and nothing is lost that was saved. What it took is printed: seconds until it was noticed, until a step was
taken again, and until one beyond it, in parts.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tests.faults import injector_hosts
from tests.faults.injector_run import Ending, Fault, Outcome, can_mount, inject, undisturbed_in
from tests.hosts.network import NoHosts
from tests.small import small_run, write_corpus
from tests.train.checkpoint import runs

FIRST, LAST = 4, runs.STEPS - 1
PARTS = {"noticing": "detection", "restarting": "restart", "loading": "load", "recomputing": "recompute"}
SOUND_ENOUGH = r"going on after step {second}\b"
FULL = r"(cannot be written|could not be saved) \([^\n]*No space left on device"
CHANGED = r"{file}: ends after \d+ of [\d,]+ tokens: the file was changed under the run"


def faults(seed: int) -> list[Fault]:
    """The faults on one host, at steps drawn by a seed."""
    draw = random.Random(seed)

    def one(layout: str, rank: int, do: str, where: str, **more) -> Fault:
        return Fault(layout, rank, {"do": do, "where": where, "step": draw.randint(FIRST, LAST), **more})

    in_passes = [
        *[("pp2", 0, "forward"), ("pp2", 1, "backward"), ("dp2", 1, "backward"), ("tp2", 1, "forward")],
        *[("dp2 pp2", 2, "forward"), ("pp2 tp2", 3, "backward"), ("pp2 interleaved", 1, "forward")],
    ]
    return [
        *[one(layout, rank, do, where) for do in ("kill", "stop", "sleep") for layout, rank, where in in_passes],
        one("pp2 zero_bubble", 1, "sleep", "weights"),
        one("pp2", 0, "spin", "backward"),
        one("dp2", 0, "sleep", "reduce"),
        one("dp2 pp2", 3, "stop", "update"),
        one("pp2", 0, "sleep", "record"),
        one("pp2", 1, "sleep", "batch"),
        one("dp2", 1, "stop", "batch"),
        one("pp2", 1, "raise", "forward"),
        one("dp2", 0, "raise", "update"),
        one("pp2 tp2", 1, "crash", "backward"),
        one("dp2", 1, "exit", "forward"),
        one("pp2", 1, "sleep", "evaluation", evaluation=True),
        one("dp2", 1, "kill", "write"),
        *damaged(one),
        *of_files(one),
    ]


def damaged(one) -> Iterator[Fault]:
    """A rank is killed when the newest of several checkpoints has been damaged: the run goes on from the one before."""
    aside = (r"{newest} is damaged \([^\n]*\): set aside as {newest}\.damaged", SOUND_ENOUGH)
    for layout, rank, before in (("pp2", 0, "damage"), ("dp2", 1, "flip"), ("pp2", 1, "tear"), ("dp2", 0, "delete")):
        fault = one(layout, rank, "kill", "forward", before=before)
        yield replace(fault, ending=Ending(said=aside[1:] if before in ("delete", "tear") else aside))
    none = (r"resume=auto: no sound checkpoint in {run}/checkpoints",)
    yield replace(
        one("pp2", 0, "kill", "forward", before="damage all"), ending=Ending(code=2, said=none, weights="lost")
    )


def of_files(one) -> Iterator[Fault]:
    """What files and numbers do: some of it costs no restart, some of it none can mend."""
    full = replace(one("pp2", 0, "fill", "record", lasts=4), needs="disk", ending=Ending(0, 0, (FULL,), False))
    yield replace(full, plant={**full.plant, "step": min(full.plant["step"], LAST - 4)})
    yield replace(
        one("dp2", 0, "fill", "record", lasts=100),
        **dict(needs="disk", ending=Ending(1, None, (FULL, rf"step {runs.STEPS} could not be saved"), False, "saved")),
    )
    remade = (r"{run} was deleted or moved while the run goes on",)
    yield replace(one("dp2", 0, "remove", "record"), ending=Ending(1, 0, remade, False))
    for layout, rank in (("pp2", 0), ("dp2", 1)):
        mended = Ending(said=(CHANGED,), names_rank=False)
        yield replace(one(layout, rank, "cut", "batch"), needs="cache", ending=mended)
    refused = Ending(2, 1, (CHANGED, r"{file}: [\d,]+ bytes, and not the [\d,]+ of [\d,]+ tokens"), False, "saved")
    yield replace(one("dp2", 0, "cut", "batch"), needs="tokens", ending=refused)
    for layout, rank in (("pp2", 1), ("dp2", 0), ("tp2", 1)):
        skipped = (r"step {step} was skipped: its loss or gradients are not finite[^\n]* its batch is samples \d+",)
        yield replace(one(layout, rank, "nan", "gradient"), ending=Ending(0, 0, skipped, False, "passed over"))
    for_good = one("pp2", 0, "nan", "gradient", lasts=100)
    yield replace(
        for_good,
        plant={**for_good.plant, "step": min(for_good.plant["step"], LAST - 3)},
        more=("train.max_skipped=3",),
        ending=Ending(3, 0, (r"step {step} was skipped", r"diverged at step \d+ of \d+"), False, "saved"),
    )


def main() -> int:
    """Inject all, and print what came of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the steps (1)")
    parser.add_argument("--only", default="", help="those with this word in their name; 'hosts' for two hosts alone")
    parser.add_argument("--list", action="store_true", help="print their names alone")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    chosen = [fault for fault in faults(options.seed) if options.only in str(fault)]
    on_hosts = [fault for fault in injector_hosts.FAULTS if options.only in str(fault)]
    if options.list:
        print("\n".join(map(str, [*chosen, *on_hosts])))
        return 0
    began, load = time.monotonic(), os.getloadavg()
    home = Path(tempfile.mkdtemp(prefix="deepnarrow-faults-"))
    (home / "corpus").mkdir()
    overrides, found, skipped = small_run(write_corpus(home / "corpus"), home / "cache"), [], []
    undisturbed = undisturbed_in(home, overrides)
    for index, fault in enumerate(chosen):
        if fault.needs == "disk" and not can_mount():
            skipped.append((str(fault), "only root makes a disk that can be full"))
            continue
        found.append((str(fault), inject(overrides, fault, home / f"{index:02d}" / "run", undisturbed)))
        _print(*found[-1], home / f"{index:02d}")
    if on_hosts:
        try:
            for fault, outcome in injector_hosts.inject(overrides, home, options.seed):
                found.append((str(fault), outcome))
                _print(*found[-1], home / "launched")
        except NoHosts as why:
            skipped += [(str(fault), str(why)) for fault in on_hosts]
    return _summarise(options, found, skipped, {"seconds": round(time.monotonic() - began, 1), "load_before": load})


def _print(name: str, outcome: Outcome, where: Path) -> None:
    again = "" if outcome.until_training is None else f"  training again after {outcome.until_training:5.1f} s"
    parts = "  ".join(f"{PARTS[part]} {value:.1f}" for part, value in outcome.seconds.items() if part in PARTS)
    lost = f", {outcome.seconds['lost']:.1f} s lost: {parts}" if outcome.seconds else ""
    noticed = "never noticed" if outcome.noticed is None else f"noticed after {outcome.noticed:5.1f} s"
    what = f"code {outcome.code}  " if outcome.code else ""
    print(
        f"{'NOT' if outcome.wrong else 'ok '} {name:62} {noticed}  {what}{outcome.culprit[:90]}{again}{lost}",
        flush=True,
    )
    for wrong in outcome.wrong:
        print(f"    {wrong} ({where})", flush=True)


def _summarise(options: argparse.Namespace, found: list, skipped: list, how: dict) -> int:
    """Print the figures over all faults, and write them down."""
    for name, why in skipped:
        print(f"skipped: {name}: {why}")
    good = sum(not outcome.wrong for _, outcome in found)
    print(f"{good} of {len(found)} as they should" + (f", {len(skipped)} skipped" if skipped else ""))
    seen = [outcome.seconds for _, outcome in found if outcome.seconds]
    mean, shares = {}, {}
    if seen:
        mean = {part: statistics.mean(each[part] for each in seen) for part in (*PARTS, "lost")}
        shares = {word: mean[part] / mean["lost"] for part, word in PARTS.items()}
        said = ", ".join(f"{word} {share:.0%}" for word, share in shares.items())
        print(f"mean seconds lost per fault, of {len(seen)} with a restart: {mean['lost']:.1f}, of which {said}")
    if options.json:
        rows = [
            {
                **{"fault": name, "right": not outcome.wrong, "wrong": outcome.wrong, "exit_code": outcome.code},
                **{"culprit": outcome.culprit, "cause": outcome.cause, "noticed_after": outcome.noticed},
                **{"training_again_after": outcome.until_training, "seconds": outcome.seconds},
            }
            for name, outcome in found
        ]
        how |= {"load_after": os.getloadavg(), "cores": os.cpu_count(), "seed": options.seed}
        figures = {**how, "mean_seconds": mean, "shares": shares, "faults": rows, "skipped": skipped}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if good == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
