import os
from pathlib import Path

import pytest

from tests.devices import GPUS, hide_gpus_from_children
from tests.small import small_run, write_corpus

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
hide_gpus_from_children()
if not GPUS:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton kernels on the CPU, slowly


LONGEST = [
    *["parallel/test_engine.py", "launch/test_supervise.py", "train/checkpoint/test_kill.py", "launch/test_bench.py"],
    *[
        "faults/test_waiting.py",
        "faults/test_kept_going.py",
        "faults/test_configuration.py",
        "parallel/test_dry_run.py",
    ],
    *[
        "train/checkpoint/test_layouts.py",
        "launch/test_pretrain.py",
        "faults/test_learned.py",
        "launch/test_convert.py",
    ],
    *["launch/study/test_study.py", "train/checkpoint/test_damage.py", "launch/cluster/test_slurm.py"],
    *["launch/check/test_check.py", "emulated/test_engines.py", "hosts/test_launch.py", "launch/test_generate.py"],
]
"""The files that take half a minute or more, the longest first."""


def pytest_configure(config):
    # A file is one worker's: pytest-xdist would hand out last those of few tests, and some of these take minutes.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    order = {Path(__file__).parent / name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    if not GPUS:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Forty files of the standard library."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def overrides(corpus, tmp_path_factory):
    """A run of seconds on that corpus, with a cache of its own."""
    return small_run(corpus, tmp_path_factory.mktemp("cache"))
