import os
import sysconfig
from pathlib import Path

import pytest

from tests.devices import GPUS, hide_gpus_from_children

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
hide_gpus_from_children()
if not GPUS:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton kernels on the CPU, slowly


def pytest_collection_modifyitems(items):
    if not GPUS:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Forty files of the standard library."""
    folder = tmp_path_factory.mktemp("corpus")
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def overrides(corpus, tmp_path_factory):
    """A run of seconds: a model of four narrow blocks on that corpus, with a cache of its own."""
    return [
        *["model.n_layers=4", "model.d_model=32", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=64"],
        *["model.vocab_size=400", "model.max_seq_len=64", "train.seq_len=32", "model.init_std=0.05"],
        *["train.global_batch=8", "train.micro_batch=2"],
        *["data=files", f"data.path={corpus}", "data.val_fraction=0.2"],
        f"data.cache_dir={tmp_path_factory.mktemp('cache')}",
    ]
