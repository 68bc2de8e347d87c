"""Scaling laws: what compute, model and data ask of each other (arXiv 2401.02954, section 3)."""
