"""The process groups that some ranks of 512 and 4,096 make while their engines are built.

A main of `tests.ranks`: a few processes share out the ranks.
"""

import hashlib
import os
from itertools import chain
from typing import Any

from tests.emulated.alone import one_of_many
from tests.emulated.engines import Job
from tests.ranks import report

JOBS = [Job(4, 16, 8, "1f1b"), Job(4, 16, 8, "interleaved"), Job(4, 16, 8, "zbv"), Job(16, 32, 8, "interleaved")]
SHARES = [(number, rank) for number, job in enumerate(JOBS) for rank in (0, job.layout.world_size * 5 // 8 + 3, -1)]
"""The number of a job and a rank of it: the first, one in the middle, the last."""


def groups_of(job: Job, rank: int) -> dict[str, Any]:
    """The calls of a rank that make process groups, by name and a digest of their sets; how many groups it is in."""
    rank %= job.layout.world_size
    with one_of_many(rank, job.layout.world_size) as said:
        job.build()
        calls, own = [], 0
        for call, sets, before in said.groups:
            ranks = list(chain(*sets))
            assert len(ranks) == len(set(ranks)), "sets that overlap"
            own += any(rank in one and len(one) > 1 for one in sets)
            # What split_group makes bears a name with the number of groups that a rank was in before.
            named = before if call == "split_group" else None
            calls.append((call, hashlib.sha256(repr(sets).encode()).hexdigest(), named))
        return {"calls": calls, "own": own}


def main() -> list[dict[str, Any]]:
    """What this process's share of `SHARES` makes."""
    mine, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return [groups_of(JOBS[number], rank) for number, rank in SHARES[mine::processes]]


if __name__ == "__main__":
    report(main)
