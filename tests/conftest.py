import gc
import os

import pytest

from tests.devices import GPUS, hide_gpus_from_children
from tests.durations import Durations
from tests.small import small_run, write_corpus

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
hide_gpus_from_children()
if not GPUS:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton kernels on the CPU, slowly


def pytest_addoption(parser):
    parser.addoption(
        "--fast", action="store_true", help="the shortest files of tests alone: little more than a minute on two cores"
    )
    parser.addoption(
        "--remember-durations", action="store_true", help="write how long each file took into tests/durations.json"
    )


def pytest_configure(config):
    # A file is one worker's: pytest-xdist would hand out last those of few tests, and some of these take minutes.
    config.option.loadscopereorder = False
    config.pluginmanager.register(Durations(config))


def pytest_collection_finish():
    # What is imported stays, a million objects, and a collection of garbage would go through all of it each time.
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # libraries that count what is left at the end would report it


def pytest_collection_modifyitems(items):
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
