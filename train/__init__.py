"""Data, optimizer, metrics, the loop, and the entry points."""
