"""DeepSpeed's hostfile: the machines of a job and the processes that each takes."""

import re
from pathlib import Path

from model.problems import BadInput

_LINE = re.compile(r"(\S+)\s+slots\s*=\s*(\d+)")


def slots_of(path: Path) -> dict[str, int]:
    """Read a hostfile: a line ``HOST slots=N`` for each machine, in the order of the ranks; ``#`` begins a comment.

    Raises:
        BadInput: with a sentence for each line that says something else, or one for a file that cannot be read.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise BadInput([f"--hostfile={path}: {error}; a file with lines such as `node1 slots=8` would work"]) from None
    slots: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        match = _LINE.fullmatch(text)
        if match is None or int(match[2]) < 1:
            problems.append(f"--hostfile={path}: line {number}, {text!r}, is no host; `node1 slots=8` would work")
        elif match[1] in slots:
            problems.append(f"--hostfile={path}: line {number}: {match[1]} stands there twice; once would work")
        else:
            slots[match[1]] = int(match[2])
    if not slots and not problems:
        problems.append(f"--hostfile={path}: has no host; a line such as `node1 slots=8` for each would work")
    if problems:
        raise BadInput(problems)
    return slots
