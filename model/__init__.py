"""The network: plain PyTorch, one process."""
