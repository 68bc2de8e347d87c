"""A check of a cluster before a run: each rank's arithmetic and memory, the links between ranks, and who is slow."""
