"""Benchmarks that anyone can run: each prints ratios against a peer or a bound of the same run.

A subject is a module here with ``measure(overrides) -> dict``, of what JSON can hold, and ``as_text(found) -> str``.
"""

ALL = ("stage", "kernels", "peers", "pipeline", "data")
"""What `deepnarrow bench` runs without a subject, in this order: minutes in all on two cores."""
SUBJECTS = (*ALL, "checkpoint", "decode", "schedules")
"""What it runs by name."""
