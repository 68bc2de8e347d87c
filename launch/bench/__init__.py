"""Benchmarks that anyone can run: each prints ratios against a peer or a bound of the same run."""
