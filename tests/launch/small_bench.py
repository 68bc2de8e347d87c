"""The checkpoint benchmark on a small model, in one rank."""

import sys

from launch.bench.checkpoint import as_text, measure
from tests.ranks import report


def run():
    found = measure(["model=tiny", "model.vocab_size=4096", f"hydra.run.dir={sys.argv[1]}/run"], rounds=2)
    print(as_text(found))
    return found


if __name__ == "__main__":
    report(run)
