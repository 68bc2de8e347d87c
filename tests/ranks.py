"""Real processes for distributed tests: start them once, run many checks in them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from train.pretrain import free_port

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(module: str, num_processes: int, folder: Path, timeout: float = 300) -> list[Any]:
    """Run `python -m module FOLDER` as `num_processes` ranks; what each passed to `report`, by rank."""
    port = str(free_port())
    processes = []
    for rank in range(num_processes):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_processes),
            "LOCAL_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", module, str(folder)]
        log = open(folder / f"rank{rank}.log", "w")  # noqa: SIM115 - the process writes to it
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
    deadline = time.monotonic() + timeout
    failed: list[int] = []
    try:
        # One rank that fails leaves the others waiting for it: the first failure ends all.
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if failed := [rank for rank, process in enumerate(processes) if process.poll()]:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    # The others only say that it left them.
    log_of = failed[0] if failed else 0
    text = (folder / f"rank{log_of}.log").read_text()
    codes = [process.returncode for process in processes]
    assert codes == [0] * num_processes, f"exit codes {codes}; rank {log_of}:\n{text[-4000:]}"
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(num_processes)]


def report(run: Callable[[], Any]) -> None:
    """The main of a rank's module: run, and hand the result to `run_ranks`."""
    result = run()
    torch.save(result, Path(sys.argv[1]) / f"rank{os.environ['RANK']}.pt")
