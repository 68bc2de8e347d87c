"""`deepnarrow launch` over two hosts: what befalls one side ends all of it, and is named.

That it goes on from there, what a cut link, a frozen host, a frozen rank and a killed agent do, and that the end is the
same to the bit, is what ``python -m tests.faults.injector --only hosts`` shows, in minutes.
"""

import os
import signal

import pytest

from tests.hosts.launched import Launched


@pytest.mark.launch
def test_a_killed_rank_ends_both_hosts_and_is_named_and_so_does_a_killed_command(hosts, overrides, tmp_path):
    run = Launched(hosts, [*overrides, "train.max_steps=null", "train.total_tokens=1e12"], tmp_path)
    run.wait_for(lambda: run.step() > 2)
    before = run.hosts.ranks(run.folder)
    os.kill(run.rank(1), signal.SIGKILL)
    run.wait_for(lambda: run.events("failed"))
    (failed,) = run.events("failed")
    assert (failed["rank"], failed["host"]) == (1, "node2") and "SIGKILL" in failed["cause"]
    run.wait_for(lambda: not set(before) & set(run.hosts.ranks(run.folder)))
    run.wait_for(lambda: len(run.left()) >= 2)  # the agents of the next start
    run.kill_command()
