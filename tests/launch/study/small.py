"""A study of seconds, and what stands in for its trainings."""

from contextlib import contextmanager

from train.strict_json import dumps

MULTI_HEAD = ["model.n_kv_heads=4", "train.total_tokens=5120", "schedule.warmup_steps=2", "train.val_sequences=4"]
SMALL = ["study.methods=[mean,first]", "study.alphas=[0.3,0.5]", "study.alpha=0.3", "study.kv_heads=[1]"]
QUICK = ["study.batches=[1,2]", "study.contexts=[8,16]", "study.windows=[8]", "study.warm_starts=[similar,aligned]"]
TRAINED = "sections=[uptraining,decode,smaller,heads,long_range,windows,warm_starts]"


def small_study(overrides, folder):
    """Return the command of a study of a model as small as it can be, of all that trains."""
    quiet = "wandb.mode=disabled"  # W&B takes most of the seconds of runs as short as these
    return [
        *overrides,
        *MULTI_HEAD,
        *SMALL,
        *QUICK,
        f"study.{TRAINED}",
        "study.seeds=[1,2]",
        quiet,
        f"study.dir={folder}",
    ]


class Ended:
    """A training that has ended."""

    def __init__(self, code):
        self.code = code

    def poll(self):
        return self.code

    def signal(self, number):
        return False

    def kill(self):
        raise AssertionError


class StandIn:
    """Writes the losses that a function gives for a run's folder and a step; those of which it gives none fail."""

    slots = 2

    def __init__(self, loss):
        self.loss, self.folders = loss, []

    @contextmanager
    def __call__(self, ranks, at_once):
        yield self

    def start(self, prepared, slot):
        run_dir, steps = prepared.run_dir, [0, *prepared.config.train.val_at]
        self.folders.append(run_dir.name)
        losses = [self.loss(run_dir, step) for step in steps]
        if None in losses:
            return Ended(1)
        run_dir.mkdir(parents=True, exist_ok=True)
        lines = [dumps({"step": step, "val_loss": loss}) for step, loss in zip(steps, losses, strict=True)]
        (run_dir / "metrics.jsonl").write_text("\n".join(lines))
        (run_dir / "summary.json").write_text('{"complete": true, "diverged": false}')
        return Ended(0)
