"""Preparation on every node of a Ray cluster: `deepnarrow prepare` started once on each, which share the work out."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.problems import BadInput


def prepare_on_nodes(address: str, overrides: Sequence[str]) -> int:
    """Start a preparation on each node of a cluster, on all cores that Ray has there, and wait for them.

    They find each other by `data.cache_dir`, which all have to share, and need deepnarrow installed. A node that is
    lost costs the shards that it had under way; those that are left do them.

    Args:
        address: of the cluster, such as auto or ray://head:10001.
        overrides: of the run that it is for, with the options that say where its configuration comes from.

    Returns:
        0 where the corpus is prepared; else the exit code of the first node that says what is wrong.

    Raises:
        BadInput: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError as error:
        raise BadInput(
            [f"--ray={address}: Ray is not installed here; pip install 'deepnarrow[ray]' would work"]
        ) from error
    try:
        ray.init(address=address, configure_logging=False, log_to_driver=False)
    except Exception as error:  # it raises a kind of its own for each way of being away
        raise BadInput([f"--ray={address}: no cluster answers ({error}); --ray=auto on one of its nodes, or the "
                        "address that ray start has said, would work"]) from error  # fmt: skip
    try:
        asked = {}
        for node in ray.nodes():
            cores = int(node["Resources"].get("CPU", 0))
            if node["Alive"] and cores:
                strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = ray.remote(num_cpus=cores, max_retries=0, scheduling_strategy=strategy)(_task())
                asked[task.remote(list(overrides), cores)] = node["NodeManagerAddress"]
        if not asked:
            raise BadInput([f"--ray={address}: none of its nodes has a core; a cluster with some would work"])
        return _gathered(ray, RayError, asked)
    finally:
        ray.shutdown()


def _gathered(ray: Any, lost: type[Exception], asked: dict[Any, str]) -> int:
    """Say what nodes have said; the first that is done prints what was prepared, and any that failed why."""
    codes, left = [], list(asked)
    while left:
        (done,), left = ray.wait(left, num_returns=1)
        try:
            code, out, err = ray.get(done)
        except lost as error:
            reason = str(error).split("\n")[0]
            code, out, err = 1, "", f"lost ({reason})\n"
        if code == 0 and 0 not in codes:
            print(out, end="")
        if code:
            print("".join(f"node {asked[done]}: {line}\n" for line in err.splitlines()), end="", file=sys.stderr)
        codes.append(code)
    return 0 if 0 in codes else codes[0]


def _task() -> Any:
    """Make the function that runs on a node, such as travels without this package being found there first."""
    root, asked_from = str(Path(__file__).resolve().parents[1]), os.getcwd()

    def prepare_here(overrides: list[str], cores: int) -> tuple[int, str, str]:
        import os
        import subprocess
        import sys

        # Where the code is not installed but lies in the same place, as on a shared disk, it is found as well.
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
        given = [*([] if any("data.workers=" in text for text in overrides) else [f"data.workers={cores}"]), *overrides]
        done = subprocess.run(
            [sys.executable, "-m", "deepnarrow", "prepare", *given],
            env={**os.environ, "PYTHONPATH": path},
            cwd=asked_from if os.path.isdir(asked_from) else None,  # what relative paths are relative to
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return prepare_here
