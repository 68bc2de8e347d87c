"""The plan of a study, checked before anything runs: the models that it trains, and their folders."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from conf.compose import Composition, compose_overrides, quoted
from conf.paths import checked
from conf.ramp import rungs
from conf.schema import Config
from conf.train_settings import Rate
from launch.settings import settings_of
from model.problems import BadInput
from model.regroup import Method, problem_of
from train.checkpoint.folder import CHECKPOINTS
from train.length import length_of
from train.preflight import preflight
from train.pretrained import Source, open_source

PREFIX = "study."
_SHARED = (
    *("parallel.", "wandb.", "checkpoint.", "uptrain.rate", "data.cache_dir", "model.attention", "train.precision"),
    "--config-",
)
ORIGINAL = "original"
"""The name that stands for a method where the heads are the original ones."""


@dataclass
class StudySettings:
    """The settings ``study.…``; every other override belongs to the pretraining."""

    kv_heads: list[int] | None = None
    """The numbers of key/value heads to regroup to; null is every divisor of the model's own."""
    methods: list[Method] = field(default_factory=lambda: [method for method in Method if not method.by_similarity])
    """The methods of regrouping: mean, first, random (the default), similar, aligned, svd."""
    alphas: list[float] = field(default_factory=lambda: [0.01, 0.02, 0.05, 0.1, 0.2])
    """The shares of the original tokens after which an uptraining is measured."""
    alpha: float = 0.05
    """The one of these shares at which models are compared."""
    contexts: list[int] = field(default_factory=lambda: [512, 2048, 8192])
    """The numbers of tokens before a decoded one."""
    batches: list[int] = field(default_factory=lambda: [1, 4, 16])
    """The numbers of sequences that are decoded together."""
    dir: str | None = None
    """The folder of the study; null is runs/gqa-NAME, by the pretraining's name."""


@dataclass(frozen=True)
class Uptraining:
    """A training run that continues from the original weights, regrouped or, for comparison, as they are.

    Attributes:
        kv_heads: the number of key/value heads of the model.
        method: the method of regrouping; None for the original heads.
        alphas: the shares after which it is measured; the last is its length.
        steps: the steps after which the shares are reached.
    """

    kv_heads: int
    method: Method | None
    alphas: tuple[float, ...]
    steps: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of the run: key/value heads, method and length, as in ``4-mean-0.2``."""
        return f"{self.kv_heads}-{self.method.value if self.method else ORIGINAL}-{self.alphas[-1]:g}"


@dataclass(frozen=True)
class Plan:
    """The plan of a study, after all checks.

    Attributes:
        settings: the settings of the study.
        config: the configuration of the pretraining.
        folder: the folder of the study.
        pretrain: the overrides of the pretraining; None where `source` has been trained already.
        source: the weights to begin with; None where they are still to be pretrained.
        shared: the command's overrides that are not part of a recipe, and so apply to every uptraining too.
        rate: the treatment of the learning rate in an uptraining.
    """

    settings: StudySettings
    config: Config
    folder: Path
    pretrain: list[str] | None
    source: Source | None
    shared: list[str]
    rate: Rate

    @property
    def kv_heads(self) -> list[int]:
        """The numbers of key/value heads of all models, the original's first."""
        model = self.config.model
        wanted = self.settings.kv_heads or [n for n in range(1, model.n_kv_heads) if model.n_kv_heads % n == 0]
        return sorted({*wanted, model.n_kv_heads}, reverse=True)

    def uptrainings(self, tokens: int) -> list[Uptraining]:
        """Return the uptrainings of an original that was trained on this number of tokens.

        At a constant rate, a shorter uptraining is the beginning of a longer one, and one run gives every share. A
        repeated schedule differs by length, and each share is a run.
        """
        model = self.config.model
        kinds: list[tuple[int, Method | None]] = [(model.n_kv_heads, None)]
        kinds += [(n, method) for n in self.kv_heads if n != model.n_kv_heads for method in self.settings.methods]
        shares = [(alpha, self._step(alpha, tokens)) for alpha in sorted(self.settings.alphas)]
        runs = [shares] if self.rate is Rate.end else [[share] for share in shares]
        return [
            Uptraining(n, method, tuple(alpha for alpha, _ in run), tuple(step for _, step in run))
            for n, method in kinds
            for run in runs
        ]

    def _step(self, alpha: float, tokens: int) -> int:
        steps = length_of(self.config)
        return math.ceil(alpha * tokens / steps.at(steps.schedule_steps).tokens)

    def weights(self, kv_heads: int, method: Method) -> Path:
        """Return the folder of regrouped weights."""
        return self.folder / "weights" / f"{kv_heads}-{method.value}"

    def run_dir(self, run: Uptraining) -> Path:
        """Return the run folder of an uptraining."""
        return self.folder / "uptrained" / run.name

    def overrides(self, run: Uptraining, source: Path) -> list[str]:
        """Return the overrides of an uptraining that begins with the weights at a path."""
        return [
            f"init_from={quoted(source.absolute())}",
            f"uptrain.alpha={run.alphas[-1]!r}",
            f"train.val_at={list(run.steps)}",
            *["train.val_every=0", f"train.val_sequences={self.config.train.val_sequences}", "sample.tokens=0"],
            f"name={quoted(f'{self.folder.name}-{run.name}')}",
            f"hydra.run.dir={quoted(self.run_dir(run).absolute())}",
            *self.shared,
        ]


def plan(overrides: Sequence[str]) -> Plan:
    """Check all of a study's command, and prepare its data.

    Args:
        overrides: the overrides ``study.…`` and those of the pretraining, whose model is `tiny_mha` by default;
            ``init_from`` replaces the pretraining.

    Raises:
        BadInput: the study cannot work; it lists every problem.
    """
    settings, problems = settings_of(StudySettings, PREFIX, [text for text in overrides if text.startswith(PREFIX)])
    rest = [text for text in overrides if not text.startswith(PREFIX)]
    given = {text.partition("=")[0].lstrip("+~") for text in rest}
    if refused := sorted(given & {"hydra.run.dir", "resume", "name", "uptrain.alpha"}):
        where = "study.dir=… says where a study is kept, and study.alphas=[…] how long its uptrainings are"
        raise BadInput([*problems, f"{refused[0]}: is the study's to set; {where}"])
    if not given & {"init_from", "model", "--config-name"}:
        rest = ["model=tiny_mha", *rest]
    composition = compose_overrides(rest)
    begins = composition.config.init_from
    source = open_source(begins, key="init_from") if begins is not None else None
    # Each uptraining takes its recipe from the weights.
    shared = [text for text in rest if text.startswith(_SHARED)]
    if not any(text.startswith("parallel.") for text in rest):
        layout = [f"parallel.dp={replicas}"] if (replicas := _replicas(composition, source)) > 1 else []
        rest, shared = rest + layout, shared + layout

    default = f"runs/gqa-{_name_of(source) if source else composition.config.name}"
    folder = checked("study.dir", default if settings.dir is None else settings.dir)
    pretrain = None
    if source is None:
        pretrain = [*rest, f"hydra.run.dir={quoted((folder / 'pretrained').absolute())}"]
        config = _checked(pretrain, problems)
    else:
        trial = [*rest, "uptrain.alpha=1.0", f"hydra.run.dir={quoted((folder / 'trial').absolute())}"]
        config = _checked(trial, problems, writes=False)
    study = Plan(settings, config, folder, pretrain, source, shared, composition.config.uptrain.rate)
    if problems := _problems(study, source.run.tokens if source and source.run else None):
        raise BadInput(problems)
    return study


def _name_of(source: Source) -> str:
    """Return the name of a run's folder, or that of other weights."""
    return (source.path.parents[1] if source.path.parent.name == CHECKPOINTS else source.path).name


def _checked(overrides: list[str], problems: list[str], writes: bool = True) -> Config:
    """Check that a run can start, and return its configuration."""
    try:
        config = preflight(overrides, writes=writes).config
    except BadInput as error:
        raise BadInput([*problems, *error.problems]) from None
    if problems:
        raise BadInput(problems)
    return config


def _problems(study: Plan, tokens: int | None) -> list[str]:
    """Return the problems of the study's own settings."""
    settings, model = study.settings, study.config.model
    found = []
    for n in settings.kv_heads or []:
        if problem := problem_of(model, n):
            found.append(problem.replace("--kv-heads", "study.kv_heads"))
    if not settings.methods:
        found.append("study.methods=[]: at least one of mean, first and random")
    for key in ("contexts", "batches"):
        values = getattr(settings, key)
        if not values or min(values) < 1:
            found.append(f"study.{key}={values}: at least one number, each at least 1")
    alphas = settings.alphas
    if not alphas or not all(0 < alpha < math.inf for alpha in alphas):
        return [*found, f"study.alphas={alphas}: at least one share above 0, such as 0.05"]
    if settings.alpha not in alphas:
        found.append(f"study.alpha={settings.alpha:g}: not one of study.alphas={alphas}")
    length = length_of(study.config)
    steps: dict[int, float] = {}
    for alpha in alphas:
        step = study._step(alpha, tokens or length.tokens_after(length.steps))
        if step in steps:
            found.append(f"study.alphas={alphas}: {steps[step]:g} and {alpha:g} are both {step} steps of training")
        steps[step] = alpha
    if not study.config.data.val_fraction:
        found.append("data.val_fraction=0: a study measures the loss on held-out documents; 0.01 would work")
    return found


def _replicas(composition: Composition, source: Source | None) -> int:
    """Return the largest number of replicas that the cores allow and that divides the batch; 1 on GPUs."""
    then = source.run.config["train"] if source and source.run and "train" in source.run.config else None
    train = composition.config.train
    batch, micro = (then["global_batch"], then["micro_batch"]) if then else (train.global_batch, train.micro_batch)
    try:
        batches = [rung.global_batch for rung in rungs(batch)]
    except ValueError:  # said where the configuration is checked
        return 1
    if torch.cuda.is_available() or micro < 1 or any(batch < micro or batch % micro for batch in batches):
        return 1
    cores = len(os.sched_getaffinity(0))
    return max(n for n in range(1, cores + 1) if all((batch // micro) % n == 0 for batch in batches))
