"""Benchmarks that anyone can run: each prints ratios against a peer or a bound of the same run.

A subject is a module here with ``measure(overrides) -> dict``, whose result JSON can hold, and
``as_text(found) -> str``.
"""

ALL = ("stage", "kernels", "documents", "peers", "pipeline", "data")
"""The subjects that `deepnarrow bench` runs without an argument, in this order: minutes in all on two cores."""
SUBJECTS = (*ALL, "checkpoint", "decode", "schedules", "start", "cluster", "layouts", "planner")
"""The subjects that it runs by name."""
CALIBRATES = "cluster"
"""The subject whose findings `--save` writes into a cluster file."""
