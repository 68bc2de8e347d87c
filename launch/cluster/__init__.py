"""A run over several hosts: an agent on each starts and watches its ranks, and one command keeps all of it going."""
