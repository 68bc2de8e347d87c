"""The plan of a job before it runs: what its ranks compute, send and hold, and what that costs on a cluster."""
