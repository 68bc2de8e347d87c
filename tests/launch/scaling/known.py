"""Runs that are not trained: what would train them writes losses of a known law into their folders."""

import json
from pathlib import Path

import numpy as np

from launch.scaling.fits import PowerLaw
from model.config import ModelConfig

FLOOR, A, ALPHA, BETA = 1.7, 60.0, 0.35, 0.32
"""Of the loss FLOOR + A M^-ALPHA + B D^-BETA (Hoffmann et al., arXiv 2203.15556, equation 2)."""
AT, BEST_M = 1e12, 3.6e5
"""The M that is best for a compute, which decides B."""
B = ALPHA * A * BEST_M**-ALPHA / (BETA * (AT / BEST_M) ** -BETA)
M_OPT = PowerLaw(BEST_M / AT ** (BETA / (ALPHA + BETA)), BETA / (ALPHA + BETA))
LR, BATCH = PowerLaw(0.25, -0.11), PowerLaw(0.3, 0.32)
DIVERGES = 3.0
"""Times the best rate beyond which a run does."""


def loss_of(m, tokens, lr, batch_tokens):
    """The loss without noise; NaN beyond the rate at which a run diverges."""
    compute = m * tokens
    off = np.log(lr / LR.at(compute)) ** 2 + np.log(batch_tokens / BATCH.at(compute)) ** 2
    if lr > DIVERGES * LR.at(compute):
        return float("nan")
    return (FLOOR + A * m**-ALPHA + B * tokens**-BETA) * (1 + 0.008 * off)


class Known:
    """Stands for what trains runs; `trained` has their names, and after `stop_after` of them it was told to stop."""

    def __init__(self, noise=0.001, stop_after=None):
        self.trained, self.noise, self.stop_after, self.at_once = [], noise, stop_after, []

    def __call__(self, trainings, *, at_once):
        self.at_once.append(at_once)
        for training in trainings:
            if training.is_done:
                continue
            if len(self.trained) == self.stop_after:
                return 0
            self.trained.append(training.run_dir.name)
            write(training, self.noise)
        return None


def write(training, noise):
    values = dict(text.split("=", 1) for text in training.overrides)
    model = ModelConfig(n_layers=int(values["model.n_layers"]), d_model=int(values["model.d_model"]))
    seq_len, tokens = int(values["train.seq_len"]), int(values["train.total_tokens"])
    batch = int(values["train.global_batch"]) * seq_len
    loss = loss_of(model.scaling_m(seq_len), tokens, float(values["optimizer.lr"]), batch)
    draw = np.random.default_rng([*training.run_dir.name.encode()])
    folder: Path = training.run_dir
    folder.mkdir(parents=True)
    diverged = bool(np.isnan(loss))
    record = {"step": tokens // batch, "tokens": tokens, "loss": 1.0}
    if not diverged:
        measured = loss * (1 + noise * draw.normal())
        record |= {"val_loss": measured, "val_bits_per_byte": measured / 2}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    summary = {"complete": not diverged, "diverged": diverged, "reason": None, "skipped_steps": 0}
    (folder / "summary.json").write_text(json.dumps(summary))
