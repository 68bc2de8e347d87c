"""`deepnarrow dry-run`: what the ranks of a layout hold, send and compute, by running them with nobody else there."""
