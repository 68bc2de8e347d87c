"""What the trainings of a study have come to: losses by share, weights, and the rows that models are measured on."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.study.plan import Original, Plan, Uptraining
from launch.study.seeds import spread
from launch.study.settings import Section
from launch.study.training import weights
from launch.trainings.train_all import val_losses
from model.batch import Batch
from model.config import ModelConfig
from model.problems import BadInput
from model.regroup import Method
from model.weights import StoredWeights
from train.evaluate.held_out import sets_of_run
from train.pretrained import open_source


@dataclass
class Results:
    """What sections are measured on.

    Attributes:
        study: the plan, all of whose trainings are done, but for those of the sections that have failed.
        failed: sections whose trainings have failed.
        say: the function that reports progress.
    """

    study: Plan
    failed: Collection[Section]
    say: Callable[[str], None]
    _losses: dict[Path, dict[int, float]] = field(default_factory=dict)
    _weights: dict[Path, StoredWeights] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """The seeds, in the order in which all figures over seeds are."""
        return self.study.settings.seeds

    def losses(self, run: Uptraining) -> dict[float, float]:
        """Return the validation loss in nats at each share of an uptraining, 0 included.

        Raises:
            BadInput: the run was trained with other shares.
        """
        run_dir = self.study.run_dir(run)
        if run_dir not in self._losses:
            self._losses[run_dir] = val_losses(run_dir)
        try:
            steps = zip((0.0, *run.alphas), (0, *run.steps), strict=True)
            return {alpha: self._losses[run_dir][step] for alpha, step in steps}
        except KeyError as missing:
            works = "study.dir=… of its own, or removing this folder, would work"
            raise BadInput([f"{run_dir}: was trained without a validation after step {missing}; {works}"]) from None

    def by_share(self, seed: int, kv_heads: int, method: Method | None, smaller: bool = False) -> dict[float, float]:
        """Return the losses of a number of heads at all shares that are trained with a seed."""
        study, original = self.study, Original(seed, smaller)
        if method == study.first_method(kv_heads):
            runs = study.compared(original, kv_heads)
        else:
            runs = study.by_share(original, kv_heads, method, study.settings.alpha)
        return {alpha: loss for run in runs for alpha, loss in self.losses(run).items()}

    def loss(self, kv_heads: int, alpha: float, smaller: bool = False) -> dict[str, Any]:
        """Return the loss of a number of heads by the first method at a share, as `launch.study.seeds.spread` does."""
        method = self.study.first_method(kv_heads)
        return spread([self.by_share(seed, kv_heads, method, smaller)[alpha] for seed in self.seeds])

    def name_of(self, kv_heads: int) -> str:
        """Return the name of a model: MHA, GQA-4 or MQA."""
        return self.model(kv_heads).attention_name

    def model(self, kv_heads: int) -> ModelConfig:
        """Return the shape of a model with so many key/value heads."""
        return replace(self.study.model, n_kv_heads=kv_heads)

    def uptrained(self, seed: int, kv_heads: int, smaller: bool = False) -> StoredWeights:
        """Return the weights after ``study.alpha``, by the first method."""
        study, alpha = self.study, self.study.settings.alpha
        runs = study.compared(Original(seed, smaller), kv_heads)
        return self._open(study.result(next(run for run in runs if alpha in run.alphas), alpha))

    def converted(self, seed: int, kv_heads: int) -> StoredWeights:
        """Return the weights right after conversion, by the first method."""
        method = self.study.first_method(kv_heads)
        return self._open(weights(self.study, self.study.uptraining(Original(seed), kv_heads, method)))

    def _open(self, path: Path) -> StoredWeights:
        if path not in self._weights:
            self._weights[path] = open_source(path, checked=False).weights
        return self._weights[path]

    @cached_property
    def batches(self) -> list[Batch]:
        """The held-out rows that validation measures."""
        return held_out_batches(self.study)


def held_out_batches(study: Plan) -> list[Batch]:
    """Return the held-out rows that validation measures, as micro-batches."""
    config = study.config
    size = config.train.micro_batch
    return [batch for one in sets_of_run(config, study.prepared.data) for batch in one.batches(size)[0]]
