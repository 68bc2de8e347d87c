"""Paths and names as a user gives them: what they stand for, and which of them cannot be.

Every setting and every argument of a command that is a path passes through here, so that `~` is a home in all of them.
"""

import os
import re
from pathlib import Path

from model.problems import BadInput

_MAX_PART, _MAX_PATH = 255, 4095
"""Bytes that Linux allows for a file's name and for a path."""


def expanded(given: str | os.PathLike[str]) -> Path:
    """Return the path that a user means: a leading ``~`` or ``~user`` is a home; the rest stays as it is."""
    return Path(os.path.expanduser(given))


def checked(key: str, given: str | os.PathLike[str]) -> Path:
    """Return the path that a user means.

    Raises:
        BadInput: no file can be called so.
    """
    if problems := path_problems(key, given):
        raise BadInput(problems)
    return expanded(given)


def path_problems(key: str, given: str | os.PathLike[str]) -> list[str]:
    """Say why no file can be called so; whether there is one is not looked at.

    Args:
        key: the setting or argument, such as ``data.path`` or ``--out``.
        given: its value.
    """
    text = os.fspath(given)
    said = f"{key}={_short(text)}"
    if not text.strip():
        return [f"{key}={text!r}: names no file; a path would work"]
    if "\0" in text:
        return [f"{said}: has a NUL character in it, which no path has; the path without it would work"]
    if text.startswith("~") and os.path.expanduser(text) == text:
        user, _, rest = text.partition("/")
        return [f"{said}: no user {user[1:]} is known here; ~/{rest}, ./{_short(text)} or an absolute path would work"]
    size = len(os.fsencode(os.path.expanduser(text)))
    if size > _MAX_PATH:
        return [f"{said}: {size:,} bytes, and a path has at most {_MAX_PATH:,}; a shorter one would work"]
    longest = max(text.split("/"), key=lambda part: len(os.fsencode(part)))
    if (size := len(os.fsencode(longest))) > _MAX_PART:
        return [f"{said}: {_short(longest)} has {size:,} bytes, and a file's name at most {_MAX_PART}; a shorter one "
                "would work"]  # fmt: skip
    return []


def unwritable(path: Path) -> str | None:
    """Say why a folder can be neither written nor made, beginning with what is in the way; None where it can."""
    nearest = path.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return None
    return f"{nearest}: {'no permission to write there' if nearest.is_dir() else 'not a folder'}"


def name_problems(key: str, given: str) -> list[str]:
    """Say why a name cannot be that of one folder among others, which a run's name is.

    Args:
        key: the setting, such as ``name``.
        given: its value.
    """
    if not given.strip():
        return [f"{key}={given!r}: is empty, and names a folder; {key}=trial would work"]
    why = []
    if "/" in given:
        why.append("has a / in it")
    if given[0] in ".-":
        why.append(f"begins with {given[0]}")
    if given != given.strip():
        why.append("begins or ends with a space")
    if any(not char.isprintable() and not 0xD800 <= ord(char) < 0xE000 for char in given):  # surrogates: no UTF-8
        why.append("has characters in it that cannot be seen")
    if (size := len(os.fsencode(given))) > _MAX_PART:
        why.append(f"has {size:,} bytes, more than the {_MAX_PART} of a folder's name")
    if not why:
        return []
    words = "".join(char if char.isprintable() and char != "/" else "-" for char in given[:60])
    works = re.sub(r"-{2,}|[-.]+(?=-)", "-", words).strip(" .-") or "trial"
    elsewhere = f"; hydra.run.dir={_short(given)} keeps a run elsewhere" if "/" in given and key == "name" else ""
    said = " and ".join(why)
    return [f"{key}={_short(given)}: {said}, and names one folder of runs/; {key}={works} would work{elsewhere}"]


def _short(text: str) -> str:
    """Shorten a text for a sentence, and show what cannot be seen in it."""
    seen = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return seen if len(seen) <= 80 else f"{seen[:60]}…"
