"""A rank of a check under a launcher; one of them computes everything eight times."""

import os
import sys

from launch.bench import common
from launch.check import measure  # noqa: F401 - its messages, which others take part in, are not repeated
from launch.cli import main

SLOW = "2"

if __name__ == "__main__":
    if os.environ["RANK"] == SLOW:
        seconds_of = common.seconds_of

        def slower(run, *how):
            return seconds_of(lambda: [run() for _ in range(8)], *how)

        common.seconds_of = slower
    sys.exit(main(sys.argv[1:]))
