"""Which layout of a cluster trains a model fastest (`deepnarrow plan`)."""
