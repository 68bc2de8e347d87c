"""How a model is cut over processes and how the pieces run."""
