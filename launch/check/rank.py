"""One rank of a check, as DeepSpeed's launcher starts it: this file with what is to be checked as its only argument."""

import base64
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

# As in train/pretrain.py: the folder of a script would stand first on the path.
_ROOT = str(Path(__file__).resolve().parent.parent.parent)
if __name__ == "__main__":
    if sys.path[0] == str(Path(__file__).resolve().parent):
        del sys.path[0]
    sys.path.insert(0, _ROOT)

from launch.check.measure import RankFindings, Request, measure  # noqa: E402
from model.problems import BadInput  # noqa: E402
from parallel.processes import SUPERVISOR, die_with, use_cpus_fairly  # noqa: E402

_MARK = "deepnarrow-check"
_WIDTH = 2000
"""Characters of a line: pdsh and pipes take lines of a few thousand as a whole, and no longer ones."""


def main() -> None:
    """Measure, and let rank 0 print what all ranks found, for the command that has started them."""
    die_with(os.environ.get(SUPERVISOR))
    request = Request.from_json(_decoded([sys.argv[1]]))
    found = of_all_ranks(request)
    if found is not None:
        for line in as_lines([asdict(one) for one in found]):
            os.write(1, f"{line}\n".encode())  # each in one piece, whatever other ranks write meanwhile


def of_all_ranks(request: Request) -> list[RankFindings] | None:
    """Meet the other ranks, measure with them, and return what all of them found, by rank; None but on rank 0.

    Raises:
        SystemExit: this rank or another one has failed, which each log says once.
    """
    from parallel.rendezvous import RankLost, join

    try:
        met = join()
    except (BadInput, RankLost) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2 if isinstance(error, BadInput) else 1) from None
    try:
        import torch.distributed as dist

        from parallel.deepspeed_engine import start_process_group

        device = start_process_group(met)
        use_cpus_fairly(device)
        group = dist.new_group(backend="gloo")
        own = asdict(measure(request, device, group))
        found: list[Any] | None = [None] * met.size if met.rank == 0 else None
        dist.gather_object(own, found, dst=0, group=group)
        dist.barrier(group)
        dist.destroy_process_group()
        return None if found is None else [RankFindings.from_json(one) for one in found]
    except RankLost as error:
        met.fail(1, [str(error)])
        raise SystemExit(1) from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        met.fail(1, [f"rank {met.rank} failed: {reason}"], said=True)
        raise
    finally:
        met.leave()


def encoded(value: Any) -> str:
    """Write a value as text that no shell reads anything into."""
    return base64.urlsafe_b64encode(zlib.compress(json.dumps(value).encode())).decode()


def as_lines(value: Any) -> Iterator[str]:
    """Write a value as lines, which `from_lines` finds among others."""
    text = encoded(value)
    parts = [text[start : start + _WIDTH] for start in range(0, len(text), _WIDTH)]
    for index, part in enumerate(parts):
        yield f"{_MARK} {index} of {len(parts)} {part}"


class Lines:
    """The lines of a launcher's output: those of `as_lines` are kept, and the others are someone else's."""

    def __init__(self) -> None:
        self._parts: dict[int, str] = {}
        self._all = -1

    def takes(self, line: str) -> bool:
        """Take a line, whatever a launcher has put before it; return whether it was one of `as_lines`."""
        _, mark, rest = line.partition(_MARK + " ")
        words = rest.split()
        if not mark or len(words) != 4 or words[1] != "of":
            return False
        self._parts[int(words[0])], self._all = words[3], int(words[2])
        return True

    def value(self) -> Any:
        """Return what `as_lines` was given; None where lines are missing."""
        return _decoded(self._parts[index] for index in range(self._all)) if len(self._parts) == self._all else None


def _decoded(parts: Iterable[str]) -> Any:
    return json.loads(zlib.decompress(base64.urlsafe_b64decode("".join(parts))))


if __name__ == "__main__":
    main()
