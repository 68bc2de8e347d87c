"""Faults of a run over two hosts, one after another in one run that `deepnarrow launch` keeps going.

Here nothing is forked and nothing planted: the hosts are network namespaces with an sshd each (`tests.hosts`), and what
happens is done to them from outside.
"""

import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from conf.launch_settings import LaunchConfig
from tests.faults.injector_run import Outcome, run
from tests.hosts.launched import Launched
from tests.hosts.network import two_hosts
from tests.train.checkpoint import runs

HOST, RANK = "node2", 1
"""What happens, happens to this host and to its rank."""
STEPS, APART = 400, 60
STALL = 20.0
"""Seconds that the run may stand still: longer than a host may be silent, which is known first for what it is."""
WITHIN = STALL + 20.0
"""Seconds from a fault until it is noticed, at most."""
OVERRIDES = [f"train.max_steps={STEPS}", "checkpoint.every_steps=20", "train.val_every=100"]


@dataclass(frozen=True)
class HostFault:
    """A fault on a host.

    Attributes:
        name: for people.
        do: does it.
        cause: a pattern of what is noticed.
        mend: makes it good.
        mended_first: whether it is made good before all of that start has to have ended: what is frozen cannot end.
    """

    name: str
    do: Callable[[Launched], object]
    cause: str
    mend: Callable[[Launched], object] = lambda of: None
    mended_first: bool = False

    def __str__(self) -> str:
        return f"{self.name} on two hosts"


def _to_all(number: int) -> Callable[[Launched], object]:
    """Send a signal to all processes of the host, the first among them."""

    def send(of: Launched) -> None:
        for pid in of.hosts.processes(HOST, "."):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    return send


def _kill_agent(of: Launched) -> None:
    for pid in of.hosts.processes(HOST, "-f", "launch.cluster.agent"):
        os.kill(pid, signal.SIGKILL)


LOST = "host node2 is lost: "
FAULTS = [
    HostFault("rank killed", lambda of: os.kill(of.rank(RANK), signal.SIGKILL), "was ended by SIGKILL"),
    HostFault(
        "link cut",
        lambda of: of.hosts.do("link", HOST, "down"),
        f"{LOST}nothing was heard of it for",
        lambda of: of.hosts.do("link", HOST, "up"),
    ),
    HostFault("rank stopped", lambda of: os.kill(of.rank(RANK), signal.SIGSTOP), r"was stopped \(SIGSTOP\)"),
    HostFault(
        "host frozen", _to_all(signal.SIGSTOP), f"{LOST}nothing was heard of it for", _to_all(signal.SIGCONT), True
    ),
    HostFault("agent killed", _kill_agent, f"{LOST}its connection has ended"),
    HostFault("command killed", lambda of: None, ""),
]
"""In their order; after the last, the same command is typed again."""


def inject(overrides: list[str], home: Path, seed: int) -> Iterator[tuple[HostFault, Outcome]]:
    """Do all of that to one run, and say what came of each.

    Raises:
        tests.hosts.network.NoHosts: there are no hosts to be had here.
    """
    draw = random.Random(seed)
    found: list[tuple[HostFault, Outcome]] = []
    with two_hosts(home) as hosts:
        given = [*overrides, *OVERRIDES]
        alone = home / "alone" / "run"
        assert run(given, "pp2", alone, [], LaunchConfig(0))[0] == 0
        (home / "launched").mkdir()
        launched = Launched(hosts, given, home / "launched", STALL)
        try:
            for number, fault in enumerate(FAULTS):
                step = APART * number + draw.randint(10, 30)
                launched.wait_for(lambda least=step: launched.step() >= least)
                found.append((fault, _done(launched, fault)))
            code = launched.process.wait(300)
            wrong = _wrong_end(code, launched, alone)
        except AssertionError as error:
            last = str(error).strip().splitlines()[-1]
            wrong = [f"the run has not come to its end; {launched.said} ends with: {last}"]
        finally:
            with suppress(AssertionError):
                launched.kill_command()
        for fault, outcome in found:
            outcome.code = 0
            outcome.wrong += wrong
            yield fault, outcome
        for fault in FAULTS[len(found) :]:
            yield fault, Outcome(1, wrong=wrong)


def _done(launched: Launched, fault: HostFault) -> Outcome:
    """Do one, and wait until the run is beyond it."""
    outcome = Outcome(0)
    if fault is FAULTS[-1]:
        outcome.noticed, outcome.culprit = launched.kill_command(), "nothing is left on any host"
        launched.begin()
        return outcome
    count, before = len(launched.events("failed")), set(launched.left())
    fault.do(launched)
    launched.wait_for(lambda: len(launched.events("failed")) > count)
    if fault.mended_first:
        fault.mend(launched)
    launched.wait_for(lambda: not before & set(launched.left()))
    if not fault.mended_first:
        fault.mend(launched)
    launched.wait_for(lambda: len(launched.events("recovered")) > count)
    failed, outcome.seconds = launched.events("failed")[count], launched.events("recovered")[count]["seconds"]
    outcome.cause, outcome.noticed = failed["cause"], failed["noticed_after"]
    outcome.culprit = f"rank {failed['rank']} on {failed['host']}"
    wrong = {
        f"{outcome.culprit} was named": (failed["rank"], failed["host"]) != (RANK, HOST),
        f"the cause is said to be {outcome.cause}": not re.search(fault.cause, outcome.cause),
        f"it was noticed after {outcome.noticed} s, not {WITHIN:g}": outcome.noticed > WITHIN,
        "it has failed more than once": len(launched.events("failed")) != count + 1,
    }
    outcome.wrong = [text for text, so in wrong.items() if so]
    return outcome


def _wrong_end(code: int, launched: Launched, alone: Path) -> list[str]:
    """Compare the end of the run with that of one on one host that nothing befalls."""
    wrong, deadline = [f"it ended with code {code}"] if code else [], time.monotonic() + 20
    while launched.left() and time.monotonic() < deadline:
        time.sleep(0.1)
    wrong += [f"on the hosts are left: {launched.left()}"] if launched.left() else []
    if not wrong and runs.digests(runs.saved(launched.folder, STEPS)) != runs.digests(runs.saved(alone, STEPS)):
        wrong.append("the weights at the end are others")
    if not wrong and runs.curve(launched.folder) != runs.curve(alone):
        wrong.append("the records are others")
    return wrong
