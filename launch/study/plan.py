"""Which models a study trains and where they are kept, decided before anything runs."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.compose import Composition, compose_overrides, quoted
from conf.schema import Config
from conf.train_settings import Rate
from model.problems import BadInput
from model.regroup import Method, problem_of
from train.checkpoint.folder import CHECKPOINTS
from train.learning_rate import length_of
from train.preflight import preflight
from train.pretrained import Source, open_source

PREFIX = "study."
_SHARED = ("parallel.", "wandb.", "checkpoint.", "uptrain.rate", "data.cache_dir", "model.attention", "train.precision")
ORIGINAL = "original"
"""In the place of a method, where nothing was regrouped."""


@dataclass
class StudySettings:
    """The keys ``study.…``; every other override is of the pretraining."""

    kv_heads: list[int] | None = None
    """Key/value heads to regroup to; null is every divisor of the model's own."""
    methods: list[Method] = field(default_factory=lambda: list(Method))
    """mean, first, random."""
    alphas: list[float] = field(default_factory=lambda: [0.01, 0.02, 0.05, 0.1, 0.2])
    """Shares of the original tokens after which an uptraining is measured."""
    alpha: float = 0.05
    """The one of them by which models are compared."""
    contexts: list[int] = field(default_factory=lambda: [512, 2048, 8192])
    """Tokens that come before a decoded one."""
    batches: list[int] = field(default_factory=lambda: [1, 4, 16])
    """Sequences that are decoded together."""
    dir: str | None = None
    """Where all of it is kept; null is runs/gqa-NAME, of the pretraining's name."""


@dataclass(frozen=True)
class Uptraining:
    """One training run on from the original weights, regrouped or, as what the others are compared with, not.

    Attributes:
        kv_heads: of the model.
        method: of regrouping; None for the original heads.
        alphas: the shares after which it is measured; the last is its length.
        steps: after which each is reached.
    """

    kv_heads: int
    method: Method | None
    alphas: tuple[float, ...]
    steps: tuple[int, ...]

    @property
    def name(self) -> str:
        """``4-mean-0.2``: key/value heads, method, length."""
        return f"{self.kv_heads}-{self.method.value if self.method else ORIGINAL}-{self.alphas[-1]:g}"


@dataclass(frozen=True)
class Plan:
    """A study, checked.

    Attributes:
        settings: of the study.
        config: of the pretraining.
        folder: of the study.
        pretrain: overrides of the pretraining; None where `source` has been trained already.
        source: the weights to begin with, where they are there.
        shared: the command's overrides that are no part of a recipe, and so are every uptraining's too.
        rate: the treatment of the learning rate.
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
        """Every model's, the original's first."""
        model = self.config.model
        wanted = self.settings.kv_heads or [n for n in range(1, model.n_kv_heads) if model.n_kv_heads % n == 0]
        return sorted({*wanted, model.n_kv_heads}, reverse=True)

    def uptrainings(self, tokens: int) -> list[Uptraining]:
        """What is to be trained on, once it is known how many tokens the original has seen.

        At a rate that is held, a shorter uptraining is the beginning of a longer one, and one run gives every share. A
        schedule that is run again differs by length, and each share is a run.
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
        return math.ceil(alpha * tokens / length_of(self.config).tokens_per_step)

    def weights(self, kv_heads: int, method: Method) -> Path:
        """The folder of regrouped weights."""
        return self.folder / "weights" / f"{kv_heads}-{method.value}"

    def run_dir(self, run: Uptraining) -> Path:
        """The run folder of an uptraining."""
        return self.folder / "uptrained" / run.name

    def overrides(self, run: Uptraining, source: Path) -> list[str]:
        """Of the training run of an uptraining that begins with the weights at a path."""
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
    """Check a study's command whole, and prepare its data.

    Args:
        overrides: ``study.…``, and those of the pretraining, which is of `tiny_mha` unless they say otherwise;
            ``init_from`` takes the place of it.

    Raises:
        BadInput: with every problem found.
    """
    settings, problems = _settings([text for text in overrides if text.startswith(PREFIX)])
    rest = [text for text in overrides if not text.startswith(PREFIX)]
    given = {text.partition("=")[0].lstrip("+~") for text in rest}
    if refused := sorted(given & {"hydra.run.dir", "resume", "name", "uptrain.alpha"}):
        where = "study.dir=… says where a study is kept, and study.alphas=[…] how long its uptrainings are"
        raise BadInput([*problems, f"{refused[0]}: is the study's to set; {where}"])
    if not given & {"init_from", "model"}:
        rest = ["model=tiny_mha", *rest]
    composition = compose_overrides(rest)
    source = open_source(Path(str(composition.config.init_from))) if "init_from" in given else None
    # Each uptraining takes its recipe from the weights.
    shared = [text for text in rest if text.startswith(_SHARED)]
    if not any(text.startswith("parallel.") for text in rest):
        layout = [f"parallel.dp={replicas}"] if (replicas := _replicas(composition, source)) > 1 else []
        rest, shared = rest + layout, shared + layout

    folder = Path(settings.dir or f"runs/gqa-{_name_of(source) if source else composition.config.name}")
    pretrain = None
    if source is None:
        pretrain = [*rest, f"hydra.run.dir={quoted((folder / 'pretrained').absolute())}"]
        config = _checked(pretrain, problems)
    else:
        trial = [*rest, "uptrain.alpha=1.0", f"hydra.run.dir={quoted((folder / 'trial').absolute())}"]
        config = _checked(trial, problems, writes=False)
    made = Plan(settings, config, folder, pretrain, source, shared, composition.config.uptrain.rate)
    if problems := _problems(made, source.run.tokens if source and source.run else None):
        raise BadInput(problems)
    return made


def _name_of(source: Source) -> str:
    """Of a run, its folder's; of other weights, theirs."""
    return (source.path.parents[1] if source.path.parent.name == CHECKPOINTS else source.path).name


def _settings(overrides: Sequence[str]) -> tuple[StudySettings, list[str]]:
    node = OmegaConf.structured(StudySettings)
    problems = []
    for text in overrides:
        try:
            node = OmegaConf.merge(node, OmegaConf.from_dotlist([text.removeprefix(PREFIX)]))
        except (OmegaConfBaseException, ValueError) as error:
            key = text.removeprefix(PREFIX).partition("=")[0]
            known = f"there are {', '.join(PREFIX + name for name in StudySettings.__dataclass_fields__)}"
            problems.append(f"{text}: " + (str(error).splitlines()[0] if key in node else f"no such key; {known}"))
    settings: Any = OmegaConf.to_object(node)
    return settings, problems


def _checked(overrides: list[str], problems: list[str], writes: bool = True) -> Config:
    """The configuration of a run that can start."""
    try:
        config = preflight(overrides, writes=writes).config
    except BadInput as error:
        raise BadInput([*problems, *error.problems]) from None
    if problems:
        raise BadInput(problems)
    return config


def _problems(made: Plan, tokens: int | None) -> list[str]:
    """What of the study's own settings cannot be."""
    settings, model = made.settings, made.config.model
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
    length = length_of(made.config)
    steps: dict[int, float] = {}
    for alpha in alphas:
        step = made._step(alpha, tokens or length.steps * length.tokens_per_step)
        if step in steps:
            found.append(f"study.alphas={alphas}: {steps[step]:g} and {alpha:g} are both {step} steps of training")
        steps[step] = alpha
    if not made.config.data.val_fraction:
        found.append("data.val_fraction=0: a study measures the loss on held-out documents; 0.01 would work")
    return found


def _replicas(composition: Composition, source: Source | None) -> int:
    """Without GPUs, as many replicas as there are cores and the batch divides over."""
    then = source.run.config["train"] if source and source.run and "train" in source.run.config else None
    train = composition.config.train
    batch, micro = (then["global_batch"], then["micro_batch"]) if then else (train.global_batch, train.micro_batch)
    if torch.cuda.is_available() or micro < 1 or batch < micro or batch % micro:
        return 1
    cores = len(os.sched_getaffinity(0))
    return max(n for n in range(1, cores + 1) if (batch // micro) % n == 0)
