"""Real processes for distributed tests: start them once, run many checks in them."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


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
    try:
        # One rank that fails leaves the others waiting for it: the first failure ends all.
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() for process in processes):
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = [(folder / f"rank{rank}.log").read_text() for rank in range(num_processes)]
    codes = [process.returncode for process in processes]
    assert codes == [0] * num_processes, f"exit codes {codes}\n" + "\n".join(text[-3000:] for text in logs)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_processes)]


def report(run: Callable[[], Any]) -> None:
    """The main of a rank's module: run, and hand the result to `run_ranks`."""
    result = run()
    path = Path(sys.argv[1]) / f"rank{os.environ['RANK']}.json"
    path.write_text(json.dumps(result))
