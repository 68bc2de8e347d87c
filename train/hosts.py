"""What all hosts of a run must share, found out before its first step: run folder, code, versions and clocks.

Rank 0 says what it has; on each other host one rank compares. What differs and would train something else, or fail at
the first save, is a problem; clocks that differ are said.
"""

import platform
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from train.version import code_version, fingerprint, installed

_TOKEN = ".shared"
"""The file of a run folder that rank 0 writes at each start, and the other hosts look for."""
PATIENCE = 10.0
"""Seconds until the token is to be seen: a network file system may remember for as long what a folder had before."""
CLOCKS = 5.0
"""Seconds that clocks may differ by before it is said."""


@dataclass(frozen=True)
class SharedFacts:
    """What rank 0 has, for others to compare.

    Attributes:
        host: its name.
        run_dir: the run folder, absolute.
        token: the content of a file there; None where nothing is written there that others would need.
        code: the commit of its code, for people.
        fingerprint: the SHA-256 of its code.
        versions: of what the code stands on, by name.
    """

    host: str
    run_dir: Path
    token: str | None
    code: str
    fingerprint: str
    versions: Mapping[str, str]


def of_rank_0(run_dir: Path, saves: bool) -> SharedFacts:
    """Say what this process has, which is rank 0, and leave a token in the run folder.

    Args:
        run_dir: the run folder, which is there.
        saves: whether all ranks will write there.
    """
    token = secrets.token_hex(16) if saves else None
    if token is not None:
        (run_dir / _TOKEN).write_text(token)
    return SharedFacts(socket.gethostname(), run_dir.absolute(), token, code_version(), fingerprint(), versions())


def problems(of_rank_0: SharedFacts) -> list[str]:
    """Say what this host has otherwise than rank 0's, one sentence each with what would work."""
    found, there = [], of_rank_0.host
    if of_rank_0.token is not None and not _seen(of_rank_0.run_dir, of_rank_0.token):
        found.append(
            f"hydra.run.dir={of_rank_0.run_dir}: what rank 0 has written there on {there} is not to be seen here, and "
            "every rank saves its part there; a folder of a file system that all hosts share would work"
        )
    if fingerprint() != of_rank_0.fingerprint:
        own, theirs = code_version(), of_rank_0.code
        which = f"{own} here and {theirs} on {there}" if own != theirs else f"both hosts say {own}, and files differ"
        found.append(f"code: not that of rank 0 ({which}); one checkout that all hosts share, or the same on each, "
                     "would work")  # fmt: skip
    own_versions = versions()
    for name in sorted(own_versions.keys() | of_rank_0.versions.keys()):
        own, theirs = own_versions.get(name, "none"), of_rank_0.versions.get(name, "none")
        if own != theirs:
            found.append(f"{name}: {own} here and {theirs} on {there}, where rank 0 is; {theirs} would work")
    return found


def clock_warning(of_rank_0: SharedFacts, ahead: float) -> str | None:
    """Say that this clock is not that of rank 0; None where they agree within `CLOCKS`.

    Args:
        of_rank_0: what rank 0 has.
        ahead: seconds that this clock is ahead of rank 0's, negative behind it.
    """
    if abs(ahead) <= CLOCKS:
        return None
    what = f"{abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} that of {of_rank_0.host}"
    return (
        f"the clock of {socket.gethostname()} is {what}: times in logs, events and W&B will not be comparable; a time "
        "service (chrony, NTP) on both would help"
    )


def versions() -> dict[str, str]:
    """Find the versions of what ranks have to have the same; NCCL's and CUDA's where PyTorch has them."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "torch": torch.__version__}
    found["deepspeed"] = installed("deepspeed") or "none"
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def _seen(run_dir: Path, token: str) -> bool:
    end = time.monotonic() + PATIENCE
    while True:
        with suppress(OSError, ValueError):
            if (run_dir / _TOKEN).read_text() == token:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
