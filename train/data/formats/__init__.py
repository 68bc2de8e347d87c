"""Formats of token files that others write, and paths of other file systems."""
