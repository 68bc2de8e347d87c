"""Parallelism: how a model is cut over processes, and how each process runs its part."""
