"""A host that is lost is waited for: it may come back, or another one take its place in the hostfile."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from launch.supervise import PassedOn

ANSWER = 30.0
"""Seconds within which a host answers, or is not there."""
EVERY = 5.0
"""Seconds from one look at the hosts to the next."""


def absent(slots: Mapping[str, int], reach: Callable[[str, list[str]], list[str]]) -> dict[str, str]:
    """Return the hosts that do not answer, in their order, each with the reason: what the command last said of it.

    Args:
        slots: of all hosts, by name.
        reach: makes the command that starts another one on a host.
    """

    def why(name: str) -> str:
        program, *words = reach(name, ["true"])
        # A file, not a pipe: an ssh that stays in the background for others (ControlPersist) holds it open.
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            try:
                to = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": said}
                code = subprocess.run([program, *words], timeout=ANSWER, **to).returncode  # type: ignore[call-overload]
            except subprocess.TimeoutExpired:
                return f"{program}: not within {ANSWER:g} s"
            except OSError as error:
                return f"{program}: {error.strerror}"
            said.seek(0)
            return (said.read().strip().splitlines() or [f"{program}: exit code {code}"])[-1] if code else ""

    with ThreadPoolExecutor(32) as pool:
        return {name: reason for name, reason in zip(slots, pool.map(why, slots), strict=True) if reason}


def wait_for_all(
    hosts: Callable[[], Mapping[str, int]],
    reach: Callable[[str, list[str]], list[str]],
    minutes: float,
    signals: PassedOn,
    every: float = EVERY,
) -> tuple[dict[str, int], list[str]]:
    """Wait until all hosts answer, whichever they are by then.

    Args:
        hosts: tells the slots of all hosts, by name; it is asked again at each look.
        reach: makes the command that starts another one on a host.
        minutes: after which the wait is over, whoever is missing.
        signals: to this process; one that ends the run ends the wait.
        every: seconds from one look to the next.

    Returns:
        The hosts as they were at the last look, and those of them that did not answer.
    """
    begin = time.monotonic()
    said: dict[str, str] | None = None
    while True:
        slots = dict(hosts())
        missing = absent(slots, reach)
        waited = time.monotonic() - begin
        if not missing and said:
            _say(f"all hosts answer, after {waited:.0f} s: {', '.join(slots)}")
        if not missing or signals.fatal is not None or waited > 60 * minutes:
            return slots, list(missing)
        if [*missing] != [*(said or ())]:  # the reason of a host may be another at each look
            reasons = list(dict.fromkeys(missing.values()))
            _say(f"{', '.join(missing)}: no answer; waiting for that, or for another in its place in the hostfile, "
                 f"{minutes:g} minutes at most (launch.host_wait_minutes); {'; '.join(reasons[:4])}")  # fmt: skip
            said = missing
        end = time.monotonic() + every
        while time.monotonic() < end and signals.fatal is None:
            time.sleep(0.1)


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(text, file=sys.stderr, flush=True)
