"""What an engine does to its device beside computing: values that are read, tensors elsewhere, memory that is kept."""

import pytest

from tests.emulated.meta import SHARES
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def strays(tmp_path_factory):
    """Of each share."""
    shares = run_ranks("tests.emulated.meta", 2, tmp_path_factory.mktemp("meta"))
    return [shares[index % 2][index // 2] for index in range(len(SHARES))]


@pytest.mark.parametrize("index", range(len(SHARES)))
@pytest.mark.parametrize("phase", ["step", "evaluation"])
def test_a_step_reads_one_value_and_makes_no_tensor_on_another_device(strays, index, phase):
    """Each would have the host wait for the device; on the CPU nothing tells (finding 11, and what follows from 2).

    The steps run on the meta device, where a tensor on the CPU stands out and a copy to it cannot pass unseen.
    """
    found = strays[index][phase]
    assert found["reads"] == 1
    assert not found["elsewhere"]


def test_an_engine_that_is_dropped_frees_its_buffers(tmp_path):
    """A second one in the same process would run out of memory (finding 3).

    While hooks of autograd held their buckets, everything of the first engine was left.
    """
    (left,) = run_ranks("tests.emulated.leaks", 1, tmp_path)
    assert len(left) == 3 and not any(left.values()), left
