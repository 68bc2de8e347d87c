"""The 67B on 3,072 and 1,024 ranks under every schedule: what only breaks at scale breaks here, without a cluster.

Of each job ranks of the first, the middle and the last stage are run, and the one after the middle, which exchanges
messages with it; fewer micro-batches than `enough_micro_batches`, so that it takes a second a rank.
"""

import pytest

from conf.compose import compose_overrides
from parallel.dry_run import run
from parallel.dry_run.distinct import alone
from parallel.dry_run.matching import match
from parallel.dry_run.storages import Kind
from parallel.schedules import TABLE
from train.job import job_of

LAYOUTS = [(12, 8, 32), (16, 8, 8)]


@pytest.mark.parametrize(("pp", "tp", "dp"), LAYOUTS)
@pytest.mark.parametrize("schedule", TABLE)
def test_ranks_of_the_67b_run_and_their_messages_pair_up(schedule, pp, tp, dp):
    layout = [f"parallel.pp={pp}", f"parallel.tp={tp}", f"parallel.dp={dp}", f"parallel.schedule={schedule}"]
    job = job_of(compose_overrides(["model=67b", *layout]).config)
    stage, micro_batches = dp * tp, pp * max(1, TABLE[schedule].least_per_rank)
    places = [0, pp // 2 * stage + 1, (pp // 2 + 1) * stage + 1, pp * stage - 1]
    ranks = [alone(job, rank) for rank in places]
    runs = {one: run(job, one.rank, micro_batches=micro_batches) for one in ranks}
    found = match(job, runs)
    assert not found.problems
    # The middle and the one after it have a link for each direction; all other groups have ranks that were not run.
    assert found.groups == 2 and found.messages == micro_batches * (2 if job.placement.virtual == 1 else 4)
    parameters = job.model.num_params / (pp * tp)
    for one in runs.values():
        assert one.state[Kind.gradients] / 4 == pytest.approx(parameters, rel=0.3)
        assert one.state_bytes < one.peak < 40 * 2**30 and one.reads == 1
    # Every block's products, forward and backward, a share of the model's each.
    flops = micro_batches * 4096 * job.model.flops_per_token(4096) / (pp * tp)
    assert all(run.flops / job.settings.accumulation * micro_batches == pytest.approx(flops, rel=0.2)
               for run in runs.values())  # fmt: skip
