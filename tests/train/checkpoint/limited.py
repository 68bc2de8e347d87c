"""One rank of a run in which one rank cannot write large files."""

import os
import resource
import sys

from train.pretrain import main

if __name__ == "__main__":
    rank, limit, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    main(arguments)
