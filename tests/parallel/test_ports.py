"""Ports where ranks meet: found by a process, taken by others seconds later."""

import random
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel import processes
from parallel.processes import free_port, read_launcher
from parallel.rendezvous import Rendezvous


def _kernels():
    return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


@pytest.mark.skipif(not processes._KERNELS.exists(), reason="not Linux")
def test_no_connection_of_another_process_can_take_a_port_that_was_found():
    """The kernel gave the port of a test's run to a connection, and the run ended: it imports for seconds before."""
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) >= 45 and all(processes._FIRST_PORT <= port < _kernels() for port in ports)


def test_no_connection_can_take_the_port_of_a_slurm_job_whatever_its_number():
    environment = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "MASTER_ADDR": "node1"}
    for job in ("7", "9268", "4294967295", "x"):
        given = {**environment, "SLURM_JOB_ID": job}
        assert read_launcher(given) and 29500 <= int(given["MASTER_PORT"]) < 32768  # the kernel's begin there


def test_the_seed_of_a_process_does_not_choose_its_port():
    random.seed(1)
    first = [free_port() for _ in range(4)]
    random.seed(1)
    assert [free_port() for _ in range(4)] != first


def test_a_port_in_use_is_not_given(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port()))
        other.listen()
        used, drawn = other.getsockname()[1], []

        def draw(self, first, last):
            drawn.append(used if not drawn else used + 1)
            return drawn[-1]

        monkeypatch.setattr(random.SystemRandom, "randrange", draw)
        assert free_port() != used and drawn[0] == used


@pytest.mark.parametrize("text", ["1024 65535\n", "what", None])
def test_where_the_kernel_keeps_all_of_them_or_does_not_say_one_is_still_found(text, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_KERNELS", tmp_path / "range")
    if text:
        (tmp_path / "range").write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", free_port()))


def test_a_process_alone_meets_nobody_at_a_port(monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        alone = Rendezvous(0, 1, timedelta(seconds=5))
        dist.init_process_group("gloo", init_method=alone.init_method())
        try:
            total = torch.ones(())
            dist.all_reduce(total)
            assert dist.get_world_size() == 1 and total == 1
        finally:
            dist.destroy_process_group()
