"""The sweeps of `test_engine.py` on GPUs, over NCCL, against the same plain loop on the CPU.

One GPU has no room for two ranks: NCCL refuses to put them on one. It shows the engine, ZeRO-1, recomputation, the loss
in pieces, evaluation and decoding on a device, and that NCCL takes what it is told; messages between stages, replicas
and tensor parallelism take two GPUs, and all of them at once eight. bf16 is held to 2e-3 of the loss and 3e-2 of the
gradient norm, fp32 to 1e-4 of both.
"""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from parallel.processes import free_port
from tests.devices import GPUS, environment_with_gpus
from tests.parallel import test_engine as checks
from tests.parallel.sweep import GPU_CASES, Case
from tests.ranks import ROOT

pytestmark = pytest.mark.gpu
ALL = [
    pytest.param(
        (number, index),
        id=f"{number} GPUs {index}",
        marks=pytest.mark.skipif(number > GPUS, reason=f"takes {number} GPUs, a rank on each, and here are {GPUS}"),
    )
    for number, cases in GPU_CASES.items()
    for index in range(len(cases))
]


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """What every rank of every launch reported; each launch is made once, when it is first asked for."""
    made = {}

    def of(number):
        if number not in made:
            made[number] = launch(number, tmp_path_factory.mktemp("sweep"))
        return made[number]

    return of


def launch(number, folder):
    (folder / "cases").write_text(f"{number} GPUs")
    shared = environment_with_gpus() | {"WORLD_SIZE": str(number), "LOCAL_SIZE": str(number)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared["PYTHONPATH"] = f"{ROOT}:{shared.get('PYTHONPATH', '')}"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.sweep", str(folder)],
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(number)
    ]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * number
    finally:
        for rank in ranks:
            rank.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(number)]


@pytest.fixture
def run(request, launches):
    """A case, and the reports of its ranks in order."""
    number, index = request.param
    reports = [rank["runs"][index] for rank in launches(number)]
    return Case(**reports[0]["case"]), reports


@pytest.mark.parametrize("run", ALL, indirect=True)
@pytest.mark.parametrize(
    "check",
    [
        checks.test_loss_and_gradient_norm_are_those_of_a_plain_loop_on_every_rank,
        checks.test_initial_weights_are_bitwise_the_same,
        checks.test_updated_weights_are_those_of_the_plain_loop,
        checks.test_what_ranks_share_stays_bitwise_the_same_after_every_step,
        checks.test_evaluation_and_decoding_see_the_trained_model,
        checks.test_the_rate_that_the_trainer_sets_is_the_one_that_is_used,
    ],
    ids=lambda check: check.__name__.removeprefix("test_"),
)
def test_on_gpus(run, check):
    check(run)


@pytest.fixture
def alone_on_nccl():
    """A world of this process: every collective is a kernel all the same."""
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    yield device
    dist.destroy_process_group()


def test_nccl_takes_what_it_is_told(alone_on_nccl):
    """The calls of `parallel/`, with their dtypes, in place and not, in a world of one."""
    group = dist.split_group(split_ranks=[[0]])
    values = torch.arange(64.0, device=alone_on_nccl)
    for work in (
        dist.reduce_scatter_tensor(values[:64], values, group=group, async_op=True),
        dist.all_gather_into_tensor(values, values[:64], group=group, async_op=True),
        dist.all_gather_into_tensor(values.bfloat16(), values.bfloat16(), group=group, async_op=True),
    ):
        work.wait()
    sums = torch.tensor([1.5, 2.5], dtype=torch.float64, device=alone_on_nccl)
    dist.all_reduce(sums)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    dist.broadcast(values, src=0, group=group)
    assert sums.tolist() == [1.5, 2.5] and torch.equal(values.cpu(), torch.arange(64.0))
