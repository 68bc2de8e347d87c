"""``deepnarrow launch``: a run over several hosts, kept going by the command that has started it."""

import argparse
import os
import sys
from collections import Counter

from conf.validate import Machine, validate
from launch.cluster import printed, slurm
from launch.cluster.hosts import Cluster, over_ssh
from launch.hostfile import slots_of
from launch.persistence import Persistence
from launch.restarts import Failure
from launch.supervise import PassedOn
from model.problems import BadInput
from parallel.layout import Layout
from train import pretrain
from train.like import take_over
from train.preflight import PreparedRun, preflight

LEFT_OUT_AFTER = 2
"""Failures of one host after which it is left out, where the others can have a layout."""


def run(options: argparse.Namespace) -> int:
    """Check and prepare here, then start the ranks on all hosts; returns the exit code of the run.

    The hosts are those of a hostfile, which are reached over ssh, or those of the allocation of Slurm's that this runs
    in, which srun reaches. Where the run is only to be printed, nothing is prepared or started.

    Raises:
        BadInput: there are no hosts, or the settings cannot work on them.
    """
    if options.print:
        job = printed.job_of(options.overrides, options.gpus_per_node)
        print(printed.KINDS[options.print](job), end="")
        print("".join(f"{sentence}\n" for sentence in job.said), end="", file=sys.stderr)
        return 0
    slots, reach = _slots(options), over_ssh if options.hostfile else slurm.over_srun
    machine = Machine(gpus=0, processes=sum(slots.values()), elsewhere=True)
    prepared = preflight(take_over(options.overrides, goes_on=True), machine=machine)
    if prepared.complete:
        print(prepared.complete, file=sys.stderr)
        return 0
    run_dir = prepared.run_dir.absolute()
    arguments = pretrain.for_ranks(prepared.arguments, run_dir)
    again = pretrain.for_ranks([*prepared.arguments, *pretrain.goes_on(prepared)], run_dir)
    with PassedOn() as signals:
        cluster = Cluster(slots, run_dir, signals, reach)
        shrink = LeaveOut(cluster, prepared)
        persistence = Persistence(prepared.layout, run_dir, prepared.config.launch, again, shrink)
        return persistence.run(cluster.start, arguments, signals)


def _slots(options: argparse.Namespace) -> dict[str, int]:
    """Return the ranks of each host, by name.

    Raises:
        BadInput: nothing says what hosts there are, or what does is wrong.
    """
    if options.hostfile is not None:
        if options.gpus_per_node is not None:
            given = f"--gpus-per-node={options.gpus_per_node}"
            raise BadInput([f"{given}: --hostfile says it for each host (slots=N); one of the two would work"])
        return slots_of(options.hostfile)
    if slurm.is_allocation(os.environ):
        return slurm.slots_of_allocation(os.environ, options.gpus_per_node)
    line = "a file with a line such as `node1 slots=8` for each host would work"
    raise BadInput([f"--hostfile: not given, and this is no job of Slurm's; {line}"])


class LeaveOut:
    """Leaves out a host that has failed twice, where dp can be smaller: batch, order of samples and schedule stay.

    Args:
        cluster: whose hosts they are.
        prepared: the run.
    """

    def __init__(self, cluster: Cluster, prepared: PreparedRun):
        self._cluster, self._prepared, self._failures = cluster, prepared, Counter[str]()

    def __call__(self, failure: Failure) -> Layout | None:
        """Count a failure of a host; return the layout without the host, where that is to be left out and can be."""
        host = self._cluster.host_of(failure.rank)
        if host is None:
            return None
        self._failures[host] += 1
        rest = {name: number for name, number in self._cluster.slots.items() if name != host}
        if self._failures[host] < LEFT_OUT_AFTER or not rest:
            return None
        config = self._prepared.config
        machine = Machine(gpus=0, processes=sum(rest.values()), elsewhere=True)
        layout, problems = validate(config, machine)
        if problems or layout is None:
            works = f"the {sum(rest.values())} ranks of the others would not do ({(problems or ['no layout'])[0]})"
            print(f"{host} has failed {self._failures[host]} times and stays, since {works}", file=sys.stderr)
            return None
        print(f"{host} has failed {self._failures[host]} times and is left out: {layout}", file=sys.stderr)
        self._cluster.slots = rest
        return layout
