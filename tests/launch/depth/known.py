"""Runs that are not trained: what would train them writes losses of a known law into their folders."""

import json
import math

BEST_ASPECT = 4.2
"""The d_model / n_layers at which the law's loss is least."""


def loss_of(n_layers, d_model, lr, seed):
    """Least at `BEST_ASPECT` and at a rate that falls with depth; seeds shift all shapes alike, but one pair."""
    off = math.log(d_model / n_layers / BEST_ASPECT)
    best_lr = 0.02 if n_layers < 8 else 0.01
    return 3 + 0.01 * seed + 0.05 * off**2 + 0.3 * math.log(lr / best_lr) ** 2


class Known:
    """Stands for what trains runs; `trained` has their names, and after `stop_after` of them it was told to stop."""

    def __init__(self, loss=loss_of, stop_after=None):
        self.trained, self.loss, self.stop_after = [], loss, stop_after

    def __call__(self, trainings, *, at_once):
        for training in trainings:
            if training.is_done:
                continue
            if len(self.trained) == self.stop_after:
                return 0
            self.trained.append(training.run_dir.name)
            self._write(training)
        return None

    def _write(self, training):
        values = dict(text.split("=", 1) for text in training.overrides)
        shape = int(values["model.n_layers"]), int(values["model.d_model"])
        loss = self.loss(*shape, float(values["optimizer.lr"]), int(values["train.seed"]))
        tokens = int(values["train.global_batch"]) * int(values["train.seq_len"]) * int(values["train.max_steps"])
        record = {"step": int(values["train.max_steps"]), "tokens": tokens, "loss": 1.0}
        diverged = math.isnan(loss)
        training.run_dir.mkdir(parents=True)
        (training.run_dir / "metrics.jsonl").write_text(
            json.dumps(record | ({} if diverged else {"val_loss": loss})) + "\n"
        )
        summary = {"complete": not diverged, "diverged": diverged, "reason": None, "skipped_steps": 0}
        (training.run_dir / "summary.json").write_text(json.dumps(summary))
