"""The training runs of a study, such as a ladder of scaling runs: each an ordinary run in a folder of its own."""
