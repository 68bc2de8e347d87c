"""``deepnarrow launch``: a run over several hosts, kept going by the command that has started it."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress

from conf.validate import Machine, validate
from launch.cluster import printed, slurm
from launch.cluster.hosts import Cluster, over_ssh
from launch.cluster.waiting import wait_for_all
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
SOON = 1.0
"""Minutes that a lost host is waited for where the others can go on without it: most come back as fast as a link does,
or not for long."""


def run(options: argparse.Namespace) -> int:
    """Check and prepare here, then start the ranks on all hosts; returns the exit code of the run.

    The hosts are those of a hostfile, which are reached over ssh, or those of the allocation of Slurm's that this runs
    in, which srun reaches. Where the run is only to be printed, nothing is prepared or started.

    Raises:
        BadInput: there are no hosts, or hosts for what is only printed, or the settings cannot work on them.
    """
    if options.print:
        if options.hostfile is not None:
            given = f"--hostfile={options.hostfile} --print={options.print}"
            raise BadInput([f"{given}: what is printed has the nodes that the layout takes; one of the two would work"])
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
        leave_out = LeaveOut(cluster, prepared)
        wait = WaitForHosts(cluster, prepared, leave_out, lambda: _slots(options), signals)
        config = prepared.config
        persistence = Persistence(prepared.layout, run_dir, config.launch, again, wait, config.alerts)
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

    Attributes:
        names: of those that are left out.

    Args:
        cluster: whose hosts they are.
        prepared: the run.
    """

    def __init__(self, cluster: Cluster, prepared: PreparedRun):
        self.names = set[str]()
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
        layout, why = self.layout_on(rest)
        if layout is None:
            left = sum(rest.values())
            works = f"the {left} rank{'s' * (left != 1)} of the others would not do ({why})"
            _say(f"{host} has failed {self._failures[host]} times and stays, since {works}")
            return None
        _say(f"{host} has failed {self._failures[host]} times and is left out: {layout}")
        self.names.add(host)
        self._cluster.slots = rest
        return layout

    def layout_on(self, slots: Mapping[str, int]) -> tuple[Layout | None, str]:
        """Return the layout that the run has on these hosts; where there is none, say why in its place."""
        if not slots:
            return None, "there are none"
        machine = Machine(gpus=0, processes=sum(slots.values()), elsewhere=True)
        layout, problems = validate(self._prepared.config, machine)
        return (None, (problems or ["no layout"])[0]) if problems or layout is None else (layout, "")


class WaitForHosts:
    """Waits for a host that was lost, or for another in its place; then the hosts that failed twice are left out.

    Args:
        cluster: whose hosts they are.
        prepared: the run.
        leave_out: who decides on those that fail.
        hosts: reads the ranks of each host anew, by name.
        signals: to this process.
    """

    def __init__(
        self,
        cluster: Cluster,
        prepared: PreparedRun,
        leave_out: LeaveOut,
        hosts: Callable[[], dict[str, int]],
        signals: PassedOn,
    ):
        self._cluster, self._leave_out, self._hosts, self._signals = cluster, leave_out, hosts, signals
        self._minutes = prepared.config.launch.host_wait_minutes

    def __call__(self, failure: Failure) -> Layout | None:
        """Count a failure; wait where a host was lost; return another layout where the next start is to have one."""
        lost = self._cluster.lost
        if (layout := self._leave_out(failure)) or not lost or not self._minutes:
            return layout
        others = {name: number for name, number in self._cluster.slots.items() if name not in lost}
        minutes = min(self._minutes, SOON) if self._leave_out.layout_on(others)[0] else self._minutes
        slots, missing = wait_for_all(self._now, self._cluster.reach, minutes, self._signals)
        there = {name: number for name, number in slots.items() if name not in missing}
        if there == self._cluster.slots or self._signals.fatal is not None:
            return None
        layout, why = self._leave_out.layout_on(there)
        if layout is None:
            _say(f"the {sum(there.values())} ranks of the hosts that answer would not do ({why})")
            return None
        _say(f"the run goes on over {', '.join(there)}: {layout}")
        self._cluster.slots = there
        return layout

    def _now(self) -> dict[str, int]:
        """Read the hosts anew; those of the last start where that cannot be read, as while it is written."""
        try:
            now = self._hosts()
        except BadInput as error:
            _say("\n".join(error.problems))
            return self._cluster.slots
        return {name: number for name, number in now.items() if name not in self._leave_out.names}


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(text, file=sys.stderr, flush=True)
