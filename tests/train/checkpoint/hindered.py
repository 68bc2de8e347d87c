"""One rank of a run in which one rank cannot write as it should: no large files, slowly, or where no other looks."""

import os
import resource
import sys
import time
from pathlib import Path

from train.checkpoint.storage import Writer
from train.pretrain import main


def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), resource.RLIM_INFINITY))


def delay(seconds):
    def slow(self, plan, planner):
        time.sleep(float(seconds))
        return write(self, plan, planner)

    write, Writer._write = Writer._write, slow


def elsewhere(folder):
    def other(self, plan, planner):
        self._folder = Path(folder)
        return write(self, plan, planner)

    write, Writer._write = Writer._write, other


if __name__ == "__main__":
    rank, how, much, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        {"limit": limit, "delay": delay, "elsewhere": elsewhere}[how](much)
    main(arguments)
