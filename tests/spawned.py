"""What `torch.multiprocessing.spawn` starts, forked from the nursery: each process is spared its imports.

As a spawned one it is handed a function and its arguments pickled, and nothing else of the process that starts it but
the environment. `tests/launch/test_generate.py` spawns for real.
"""

import os
import pickle
import sys
import tempfile
from pathlib import Path

from tests.ranks import nursery

CALL = "call"
SECONDS = 300


def spawn(function, arguments=(), number=1):
    """Call a function in so many processes with the index of each, and wait for them.

    Raises:
        AssertionError: a process has failed; with what the first of them has said.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, CALL).write_bytes(pickle.dumps((dict(os.environ), function, arguments)))
        codes = nursery().start("tests.spawned", number, [folder], Path(folder)).wait(SECONDS)
        failed = [Path(folder, f"rank{rank}.log").read_text() for rank, code in enumerate(codes) if code]
        assert not failed, f"exit codes {codes}: {failed[0][-4000:]}"


def main():
    index = int(os.environ["RANK"])
    environment, function, arguments = pickle.loads(Path(sys.argv[1], CALL).read_bytes())
    os.environ.clear()
    os.environ.update(environment)
    function(index, *arguments)


if __name__ == "__main__":
    main()
