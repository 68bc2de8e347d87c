"""``deepnarrow launch``: a run over the hosts of a hostfile, kept going by the command that has started it."""

import argparse
import sys
from collections import Counter

from conf.validate import Machine, validate
from launch.cluster.hosts import Cluster
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

    Raises:
        BadInput: there is no hostfile, or the settings cannot work on its hosts.
    """
    if options.hostfile is None:
        raise BadInput(["--hostfile: not given; a file with a line such as `node1 slots=8` for each host would work"])
    slots = slots_of(options.hostfile)
    machine = Machine(gpus=0, processes=sum(slots.values()), elsewhere=True)
    prepared = preflight(take_over(options.overrides, goes_on=True), machine=machine)
    if prepared.complete:
        print(prepared.complete, file=sys.stderr)
        return 0
    run_dir = prepared.run_dir.absolute()
    arguments = pretrain.for_ranks(prepared.arguments, run_dir)
    again = pretrain.for_ranks([*prepared.arguments, *pretrain.goes_on(prepared)], run_dir)
    with PassedOn() as signals:
        cluster = Cluster(slots, signals)
        shrink = LeaveOut(cluster, prepared)
        persistence = Persistence(prepared.layout, run_dir, prepared.config.launch, again, shrink)
        return persistence.run(cluster.start, arguments, signals)


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
