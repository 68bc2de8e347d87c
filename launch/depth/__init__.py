"""Deep and narrow against shallow and wide: models of other aspects d_model / n_layers at an equal cost."""
