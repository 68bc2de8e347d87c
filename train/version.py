"""Which code this is: its commit, or the version that is installed, and that of what it stands on."""

import hashlib
import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_STANDS_ON = ("torch", "deepspeed")
_FLOORS = ("model", "parallel", "conf", "train", "launch", "deepnarrow")


@cache
def code_version() -> str:
    """Find the commit of this code, with ``+changes`` where the working tree differs; else the installed version."""
    return commit() or installed("deepnarrow") or "unknown"


def commit() -> str | None:
    """Find the commit of this code, with ``+changes`` where the working tree differs; None where git does not know."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # installed inside of another project's repository, it would get that one's commit
        return None
    with suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(root)]
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
        return found + ("+changes" if changes.strip() else "")
    return None


@cache
def fingerprint() -> str:
    """Compute the SHA-256 of this code, by paths and contents of its files, in hexadecimal.

    Whatever it is that two hosts have, a clone, a copy without git or an installed package, is the same code where this
    is the same.
    """
    root = Path(__file__).resolve().parent.parent
    found = hashlib.sha256()
    paths = [path for floor in _FLOORS for kind in ("py", "yaml") for path in (root / floor).rglob(f"*.{kind}")]
    for path in sorted(paths):
        if path.name.startswith("."):  # an editor's
            continue
        content = path.read_bytes()
        found.update(f"{path.relative_to(root)} {len(content)} ".encode() + content)
    return found.hexdigest()


def installed(package: str) -> str | None:
    """Find the version of an installed package without importing it; None where it is not installed."""
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def versions() -> str:
    """Say the versions of this project, of its commit, and of what it stands on, a line each."""
    lines = [f"deepnarrow {installed('deepnarrow') or 'not installed'}", f"commit {commit() or 'unknown'}"]
    lines += [f"{package} {installed(package) or 'not installed'}" for package in _STANDS_ON]
    return "\n".join([*lines, f"python {platform.python_version()}"])
