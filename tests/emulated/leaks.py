"""Two engines after each other in one process: whether the first one's buffers are gone.

A main of `tests.ranks`.
"""

import gc
import weakref

from tests.emulated.alone import one_of_many
from tests.emulated.engines import RATE, Job, batches
from tests.ranks import report


def buffers_left(job: Job, steps: int) -> list[str]:
    """Buffers of an engine that are there when nothing holds it any more."""
    engine = job.build()
    for _ in range(steps):
        engine.step(batches(), RATE)
    held = {
        f"{name} of bucket {index}": weakref.ref(getattr(bucket, name))
        for index, bucket in enumerate(engine.zero.buckets)
        for name in ("weights", "gradients", "master")
    }
    held |= {f"layer {name}": weakref.ref(layer) for name, layer in engine.layers.items()}
    assert all(one() is not None for one in held.values())
    del engine
    gc.collect()
    return [name for name, one in held.items() if one() is not None]


def main() -> dict[str, list[str]]:
    """What is left of each of several engines, in one process after each other."""
    job = Job(2, 2, 1, "zero_bubble")
    with one_of_many(0, job.layout.world_size):
        return {
            f"engine {index} after {steps} steps": buffers_left(job, steps) for index, steps in enumerate((0, 2, 1))
        }


if __name__ == "__main__":
    report(main)
