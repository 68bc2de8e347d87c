"""Faults planted in runs that are kept going: ``python -m tests.faults.injector [--seed N] [--only WORD] [--list]``.

Each is noticed, its rank is named, the run goes on by itself, and ends with the bits of a run that nothing befell. What
it took is printed: seconds until it was noticed, and until a step beyond it was taken, in parts. In place of
DeepSpeed's launcher, ranks are forked from a process that has imported everything (`tests.ranks`); all else is what
`deepnarrow train` runs.
"""

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from conf.launch_settings import LaunchConfig
from launch.persistence import Persistence
from parallel.layout import Layout
from tests.ranks import nursery
from tests.train.checkpoint import runs

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
FIRST, LAST = 4, runs.STEPS - 1
OVERRIDES = ["checkpoint.every_steps=3", "checkpoint.every_minutes=null"]


@dataclass(frozen=True)
class Fault:
    """A fault and what is to come of it.

    Attributes:
        layout: of `LAYOUTS`.
        rank: that it befalls.
        plant: of the arguments of `tests.faults.held_up.befall`.
    """

    layout: str
    rank: int
    plant: dict = field(default_factory=dict)

    def __str__(self) -> str:
        told = {**self.plant, "before": self.plant.get("before") or ""}
        return (
            f"{told['do']} in {told['where']} {told['before']} rank {self.rank} of {self.layout}, step {told['step']}"
        )


@dataclass
class Outcome:
    """What came of a fault."""

    code: int
    rank: int | None = None
    cause: str = ""
    noticed: float = 0.0
    seconds: dict = field(default_factory=dict)
    restarts: int = 0
    orphans: int = 0
    same: bool = False

    def as_it_should(self, fault: Fault) -> bool:
        """Whether all is as said."""
        named = self.rank == fault.rank and self.restarts == 1
        return self.code == 0 and self.same and not self.orphans and named


def faults(seed: int) -> list[Fault]:
    """Thirty and more, at steps drawn by a seed."""
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
        one("pp2", 0, "kill", "forward", before="damage"),
        one("dp2", 0, "kill", "forward", before="delete"),
    ]


def start_by_fork(faults: list[dict], num: int, folder: Path, pids: list[int]):
    """Make what `Persistence.run` starts a run with, once."""

    def start(arguments, environment, look) -> int:
        module, before = ("tests.faults.held_up", [json.dumps(faults)]) if faults else ("train.pretrain", [])
        logs = folder.parent / f"{folder.name}-start-{len(pids) // num + 1}"
        logs.mkdir()
        ranks = nursery().start(module, num, [*before, *arguments], logs, **environment)
        pids.extend(ranks.pids)
        while None in ranks.codes and not any(ranks.codes):
            if look():
                ranks.signal(signal.SIGKILL)
            time.sleep(0.1)
        look()
        first = next((code for code in ranks.codes if code), 0)
        ranks.wait(1.0)
        return 128 - first if first < 0 else first

    return start


class NoSignals:
    """Of a run that is told nothing."""

    first = fatal = None


def run(
    overrides: list[str], layout: str, folder: Path, faults: list[dict], settings: LaunchConfig
) -> tuple[int, list[int]]:
    """Run to the end, kept going; the exit code and the process ids of all ranks there were."""
    grid, more = LAYOUTS[layout]
    folder.mkdir(parents=True, exist_ok=True)
    given = [*runs.DEFAULTS, *OVERRIDES, *overrides, *more, f"hydra.run.dir={folder}"]
    given = list({word.partition("=")[0]: word for word in given}.values())  # the last of each key
    pids: list[int] = []
    start = start_by_fork(faults, grid.world_size, folder, pids)
    return Persistence(grid, folder, settings, given).run(start, given, NoSignals()), pids


def inject(overrides: list[str], fault: Fault, folder: Path, undisturbed: Path, stall: float = STALL) -> Outcome:
    """Plant a fault in a run, and say what came of it."""
    where = {"once": str(folder.parent / f"{folder.name}.done"), "checkpoints": str(folder / "checkpoints")}
    planted = {**fault.plant, **where, "rank": fault.rank}
    code, pids = run(overrides, fault.layout, folder, [planted], LaunchConfig(3, stall))
    outcome = Outcome(code, orphans=sum(psutil.pid_exists(pid) for pid in pids))
    if (folder / "events.jsonl").exists():
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        failed = [event for event in events if event["event"] == "failed"]
        outcome.restarts, outcome.rank, outcome.cause = len(failed), failed[0]["rank"], failed[0]["cause"]
        outcome.noticed = failed[0]["noticed_after"]
        outcome.seconds = next((event["seconds"] for event in events if event["event"] == "recovered"), {})
    if code == 0:
        last = [runs.digests(runs.saved(where, runs.STEPS)) for where in (folder, undisturbed)]
        outcome.same = last[0] == last[1] and runs.curve(folder) == runs.curve(undisturbed)
    return outcome


def main() -> int:
    """Inject all, and print what came of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the steps (1)")
    parser.add_argument("--only", default="", help="those with this word in their name")
    parser.add_argument("--list", action="store_true", help="print their names alone")
    options = parser.parse_args()
    chosen = [fault for fault in faults(options.seed) if options.only in str(fault)]
    if options.list:
        print("\n".join(map(str, chosen)))
        return 0
    home = Path(tempfile.mkdtemp(prefix="deepnarrow-faults-"))
    overrides, seen, good, undisturbed = small_run(home), [], 0, {}
    for index, fault in enumerate(chosen):
        if fault.layout not in undisturbed:
            undisturbed[fault.layout] = home / "undisturbed" / fault.layout.replace(" ", "-")
            assert run(overrides, fault.layout, undisturbed[fault.layout], [], LaunchConfig(0))[0] == 0
        outcome = inject(overrides, fault, home / f"{index:02d}", undisturbed[fault.layout])
        good += (right := outcome.as_it_should(fault))
        seen += [outcome.seconds] if outcome.seconds else []
        parts = "  ".join(f"{name} {value:5.1f}" for name, value in outcome.seconds.items())
        print(
            f"{'ok ' if right else 'NOT'} {fault!s:58} rank {outcome.rank} {outcome.cause[:40]:40}  {parts}", flush=True
        )
        if not right:
            print(f"    {outcome}\n    {home / f'{index:02d}'}", flush=True)
    print(f"{good} of {len(chosen)} as they should")
    if seen:
        mean = {name: statistics.mean(each[name] for each in seen) for name in seen[0]}
        shares = ", ".join(f"{name} {value / mean['lost']:.0%}" for name, value in mean.items() if name != "lost")
        print(f"mean seconds lost per fault: {mean['lost']:.1f}, of which {shares}")
    return 0 if good == len(chosen) else 1


def small_run(home: Path) -> list[str]:
    """A run of seconds on forty files of the standard library."""
    import sysconfig

    corpus = home / "corpus"
    corpus.mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]:
        (corpus / path.name).write_bytes(path.read_bytes())
    return [
        *["model.n_layers=4", "model.d_model=32", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=64"],
        *["model.vocab_size=400", "model.max_seq_len=64", "train.seq_len=32", "model.init_std=0.05"],
        *["train.global_batch=8", "train.micro_batch=2", "data=files", f"data.path={corpus}", "data.val_fraction=0.2"],
        f"data.cache_dir={home / 'cache'}",
    ]


if __name__ == "__main__":
    sys.exit(main())
