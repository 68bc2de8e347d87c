"""Ways to start it."""
