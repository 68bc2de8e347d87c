"""The formulas at the 67B's shapes, compiled for an H100: as many kernels as `model/fused.py` says."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
X, KV, WIDE = 4096 * 8192 * 2, 4096 * 8 * 128 * 2, 4096 * 22016 * 2  # bytes of (L, D), (L, G K) and (L, F) in bf16
ROWS, TOKENS = 8192 * 2, 4096 * 4  # bytes of a norm's weight in bf16, and of a number in fp32 for each token

EXPECTED = {
    # number of kernels, and what they allocate beside small tables: their outputs and nothing else
    "norm": (1, [X]),
    "norm backward": (3, [X, ROWS]),
    "add, norm": (1, [X, X]),
    "add, norm backward": (3, [X, ROWS]),
    "rotary": (2, [X, KV]),
    "rotary backward": (2, [X, KV]),
    "rotary at positions": (2, [X, KV]),
    "SwiGLU": (1, [WIDE]),
    "SwiGLU backward": (1, [WIDE, WIDE]),
    "loss": (2, [TOKENS] * 3),
    "loss backward": (1, []),  # in the place of the logits
}
ASSEMBLED = ["add, norm", "SwiGLU backward"]


def described(found):
    return len(found["kernels"]), found["returned"]


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    cache = tmp_path_factory.mktemp("lowered")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.lowering", *(ASSEMBLED if has_ptxas() else [])],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def has_ptxas():
    triton = find_spec("triton")
    return triton is not None and (Path(triton.origin).parent / "backends/nvidia/bin/ptxas").exists()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_formula_is_so_many_kernels_and_allocates_its_outputs_alone(lowered, name):
    found = lowered[name]
    assert described(found) == EXPECTED[name], found
    assert found["others"] == [] and found["symbols"] == []
    assert found["scratch"] <= 2**20


def test_a_second_width_is_compiled_for_itself(lowered):
    found = lowered["a second width"]
    assert described(found) == (1, [X // 2]) and found["symbols"] == []


def test_what_is_not_as_it_should_be_is_noticed(lowered):
    assert len(lowered["two passes"]["kernels"]) > 1
    assert lowered["with a product"]["others"]
    assert lowered["a second width, symbolic"]["symbols"]


@pytest.mark.parametrize("name", ASSEMBLED)
def test_ptxas_assembles_it_for_an_h100(lowered, name):
    if not has_ptxas():
        pytest.skip("triton comes without ptxas here")
    sizes = lowered[name]["assembled"]
    assert list(sizes) == lowered[name]["kernels"] and all(size > 0 for size in sizes.values())
