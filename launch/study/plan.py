"""The plan of a study, checked before anything runs: the models that it trains, and their folders."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conf.clusters import cluster_of
from conf.compose import compose_overrides, quoted
from conf.overrides import key_of
from conf.paths import checked, path_problems
from conf.schema import Config
from conf.search import OWN, split_options
from conf.train_settings import Rate
from launch.study.settings import (
    Section,
    StudySettings,
    Window,
    problems_of_lists,
    problems_of_model,
    sections_of,
    windows_of,
)
from launch.trainings.asked import asked_of, unmeasured
from launch.trainings.recipe import keep_recipe, other_recipe, recipe_of
from launch.trainings.train_all import Training
from model.config import ModelConfig
from model.problems import BadInput
from model.regroup import Method
from train.checkpoint.folder import CHECKPOINTS, name_of
from train.length import length_of
from train.preflight import PreparedRun, preflight
from train.pretrained import Source, open_source

PREFIX = "study."
_SHARED = (
    *("parallel.", "wandb.", "alerts.", "checkpoint.", "launch.", "cluster", "uptrain.rate"),
    *("data.cache_dir", "data.path", "data.tokenizer"),
    *("model.attention", "model.kernels", "train.precision", "train.micro_batch"),
)
"""Keys, or beginnings of keys, of what is no part of a recipe: how and where runs run, and where their data lie."""
_OF_GIVEN = ("init_from", "train.val_sequences")
"""What else a study of given weights takes."""
_RECIPE = ("model", "data", "optimizer", "schedule", "train")
_SET = {
    "hydra.run.dir": "study.dir=… says where a study is kept",
    "name": "study.dir=… names the study, and each run in it by its model",
    "resume": "the same command goes on, and a study.dir of its own begins anew",
    "uptrain.alpha": "study.alphas=[…] says how long uptrainings are",
    "train.seed": "study.seeds=[…] would work",
    "checkpoint.every_steps": "it saves where it looks; checkpoint.every_minutes works",
    "checkpoint.keep_every": "it keeps what it looks at; checkpoint.keep_last works",
}
"""Overrides that a study sets itself, and what works in their place."""
ORIGINAL = "original"
"""The name that stands for a method where the heads are the original ones."""


@dataclass(frozen=True)
class Original:
    """A model that uptrainings begin with.

    Attributes:
        seed: one of ``study.seeds``.
        smaller: whether it is the smaller model, or that of the study.
    """

    seed: int
    smaller: bool = False


@dataclass(frozen=True)
class Uptraining:
    """A training run that continues from trained weights, regrouped or, for comparison, as they are.

    Attributes:
        original: the weights.
        kv_heads: the number of key/value heads of the model.
        method: the method of regrouping; None for the original heads.
        alphas: the shares after which it is measured; the last is its length.
        steps: the steps after which the shares are reached.
        window: that it is uptrained with; None is as the original was trained.
        before: the uptraining whose result it regroups, where heads are grouped step by step; None regroups `original`.
        chain: the steps of each uptraining of such a sequence; empty for a single one.
    """

    original: Original
    kv_heads: int
    method: Method | None
    alphas: tuple[float, ...]
    steps: tuple[int, ...]
    window: Window | None = None
    before: "Uptraining | None" = None
    chain: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The name of the run: key/value heads, method and length, as ``4-mean-0.2``, and what else sets it apart."""
        name = f"{self.kv_heads}-{self.method.value if self.method else ORIGINAL}-{self.alphas[-1]:g}"
        if self.window:
            name += f"-w{str(self.window).replace(':', '')}"
        if self.chain:
            name += f"-step{self.level}of{len(self.chain)}"
        return name

    @property
    def level(self) -> int:
        """The number of uptrainings up to this one, itself included."""
        return 1 + (self.before.level if self.before else 0)


@dataclass(frozen=True)
class Plan:
    """The plan of a study, after all checks.

    Attributes:
        settings: the settings of the study.
        sections: what is asked, in order.
        config: the configuration of the pretraining.
        prepared: its checks, and its data.
        folder: the folder of the study.
        pretrain: the overrides of the pretraining, without its seed; empty where `source` has been trained already.
        source: the weights to begin with; None where they are still to be pretrained.
        shared: the command's overrides that are not part of a recipe, and so apply to every uptraining too.
        rate: the treatment of the learning rate in an uptraining.
    """

    settings: StudySettings
    sections: list[Section]
    config: Config
    prepared: PreparedRun
    folder: Path
    pretrain: list[str]
    source: Source | None
    shared: list[str]
    rate: Rate

    @property
    def model(self) -> ModelConfig:
        """The original model's shape."""
        return self.config.model

    @property
    def kv_heads(self) -> list[int]:
        """The numbers of key/value heads of all models, the original's first."""
        model = self.config.model
        wanted = self.settings.kv_heads or [n for n in range(1, model.n_kv_heads) if model.n_kv_heads % n == 0]
        return sorted({*wanted, model.n_kv_heads}, reverse=True)

    @property
    def windows(self) -> list[Window]:
        """The windows that models are uptrained with."""
        return windows_of(self.settings, self.model, self.config.train.seq_len)

    @property
    def few(self) -> list[int]:
        """The numbers of heads where three stand for all: the original's, the most after it, and the fewest."""
        return list(dict.fromkeys([*self.kv_heads[:2], self.kv_heads[-1]]))

    @property
    def smaller_model(self) -> ModelConfig:
        """The smaller multi-head model: as many layers as keep the cache of the model with the most fewer heads."""
        model, layers = self.model, self.settings.smaller_layers
        grouped = next((n for n in self.kv_heads if n < model.n_kv_heads), max(model.n_kv_heads // 2, 1))
        share = model.n_layers * grouped / model.n_kv_heads
        return replace(model, n_layers=layers or min(max(round(share), 1), model.n_layers - 1))

    @property
    def tokens(self) -> int:
        """The tokens that the original has been trained on."""
        if self.source and self.source.run:
            return self.source.run.tokens
        length = length_of(self.config)
        return length.tokens_after(length.steps)

    @property
    def step_tokens(self) -> int:
        """The tokens of a step of an uptraining."""
        length = length_of(self.config)
        return length.at(length.schedule_steps).tokens

    @property
    def recipe(self) -> dict[str, Any]:
        """What all runs of the folder share and their names do not say, so that others are not taken for them."""
        settings, source = self.settings, self.source
        extra: dict[str, Any] = {
            "uptrain.rate": self.rate.name,
            "study.alphas": sorted(settings.alphas),
            "study.alpha": settings.alpha,
        }
        if source:  # the seed of a run counts from the first
            extra["init_from"] = str(source.path.absolute())
            extra["init_from's step"] = source.run.step if source.run else None
            extra["study.seeds[0]"] = settings.seeds[0]
        return recipe_of(self.config, {"train.seed"}, extra)

    def keep_recipe(self) -> None:
        """Write the recipe of the runs into the study's folder."""
        keep_recipe(self.folder, self.recipe)

    def step_of(self, alpha: float) -> int:
        """Return the step after which an uptraining has seen a share of the original tokens."""
        return math.ceil(alpha * self.tokens / self.step_tokens)

    def uptraining(self, original: Original, kv_heads: int, method: Method | None, **other: object) -> Uptraining:
        """Return an uptraining that is measured at ``study.alpha`` alone."""
        alpha = self.settings.alpha
        return Uptraining(original, kv_heads, method, (alpha,), (self.step_of(alpha),), **other)  # type: ignore[arg-type]

    def compared(self, original: Original, kv_heads: int) -> list[Uptraining]:
        """Return the uptrainings of a number of heads by the first method, or of the original, with all their shares.

        At a constant rate, a shorter uptraining is the beginning of a longer one, and one run gives every share. A
        repeated schedule differs by length, and each share is a run. With the first seed shares go on above
        ``study.alpha``.
        """
        most = math.inf if original == Original(self.settings.seeds[0]) else self.settings.alpha
        return self.by_share(original, kv_heads, self.first_method(kv_heads), most)

    def first_method(self, kv_heads: int) -> Method | None:
        """Return the method by which a number of heads is compared with others; None for the original's."""
        return None if kv_heads == self.model.n_kv_heads else self.settings.methods[0]

    def by_share(self, original: Original, kv_heads: int, method: Method | None, most: float) -> list[Uptraining]:
        """Return the uptrainings that give all shares up to one, as few as the learning rate allows."""
        shares = [(alpha, self.step_of(alpha)) for alpha in sorted(self.settings.alphas) if alpha <= most]
        runs = [shares] if self.rate is Rate.end else [[share] for share in shares]
        return [
            Uptraining(original, kv_heads, method, tuple(alpha for alpha, _ in run), tuple(step for _, step in run))
            for run in runs
        ]

    # ---- folders and overrides ----

    def folder_of(self, original: Original) -> Path:
        """Return the folder of what comes of an original."""
        return self.folder / f"seed-{original.seed}" / (self._smaller if original.smaller else "")

    @property
    def _smaller(self) -> str:
        """The name of the smaller model, whose layers are not part of the recipe."""
        return f"smaller-{self.smaller_model.n_layers}layers"

    def path_of(self, original: Original) -> Path:
        """Return where its weights are, or will be once it is trained."""
        return self.source.path if self.source else self.folder_of(original) / "pretrained"

    def weights(self, run: Uptraining) -> Path:
        """Return the folder of the regrouped weights that an uptraining begins with.

        Those of one original are the same for all seeds.
        """
        assert run.method is not None
        if run.before:
            return self.folder_of(run.original) / "weights" / f"{self.run_dir(run.before).name}-{run.kv_heads}"
        above = self.folder if self.source else self.folder_of(run.original)
        return above / "weights" / f"{run.kv_heads}-{run.method.value}"

    def run_dir(self, run: Uptraining) -> Path:
        """Return the run folder of an uptraining."""
        return self.folder_of(run.original) / "uptrained" / run.name

    def result(self, run: Uptraining, alpha: float) -> Path:
        """Return the checkpoint of an uptraining at a share, which is ``study.alpha`` or its last."""
        return self.run_dir(run) / CHECKPOINTS / name_of(run.steps[run.alphas.index(alpha)])

    def pretraining(self, original: Original) -> Training:
        """Return the pretraining of an original."""
        overrides = [*self.pretrain, f"train.seed={original.seed}"]
        if original.smaller:
            overrides.append(f"model.n_layers={self.smaller_model.n_layers}")
        kind = self._smaller if original.smaller else "pretrained"
        return Training(f"{self.folder.name}-{kind}-s{original.seed}", self.path_of(original), tuple(overrides))

    def training(self, run: Uptraining, begins: Path) -> Training:
        """Return an uptraining that begins with the weights at a path."""
        alpha = run.alphas[-1] / len(run.chain) if run.chain else run.alphas[-1]
        overrides = [
            f"init_from={quoted(begins.absolute())}",
            f"uptrain.alpha={alpha!r}",
            f"train.val_at={list(run.steps)}",
            *["train.val_every=0", f"train.val_sequences={self.config.train.val_sequences}", "sample.tokens=0"],
        ]
        if run.window:
            overrides += [f"model.window={run.window.tokens}", f"model.window_pattern={run.window.pattern or 'null'}"]
        if run.chain:  # a share of the original's tokens, not of those of the uptraining before
            overrides.append(f"train.total_tokens={run.steps[-1] * self.step_tokens}")
        if self.source and self.source.run and (off := run.original.seed - self.settings.seeds[0]):
            overrides.append(f"train.seed={int(self.source.run.config['train']['seed']) + off}")
        at = self.step_of(self.settings.alpha)
        if run.steps[-1] > at and at in run.steps:  # what heads hold is looked at there
            overrides += [f"checkpoint.every_steps={at}", f"checkpoint.keep_every={at}"]
        kind = f"{self._smaller}-" if run.original.smaller else ""
        name = f"{self.folder.name}-{kind}{run.name}-s{run.original.seed}"
        return Training(name, self.run_dir(run), (*overrides, *self.shared))


def plan(overrides: Sequence[str]) -> Plan:
    """Check all of a study's command, and prepare its data.

    Args:
        overrides: the overrides ``study.…`` and those of the pretraining, whose model is `tiny_mha` by default;
            ``init_from`` replaces the pretraining.

    Raises:
        BadInput: the study cannot work; it lists every problem.
    """
    asked = asked_of(overrides, StudySettings, PREFIX, _SET)
    settings, problems = asked.settings, asked.problems
    if asked.refused:
        raise BadInput([*problems, *asked.refused])
    options, rest = split_options(asked.rest)
    if not asked.keys & {"init_from", "model"} and options.config_name == OWN:
        rest = ["model=tiny_mha", *rest]
    composition = compose_overrides([*options.arguments, *rest])
    begins = composition.config.init_from
    source = open_source(begins, key="init_from") if begins is not None else None
    if source and (refused := _not_of_given(rest)):
        raise BadInput([*problems, *refused])
    # Each uptraining takes its recipe from the weights.
    shared = [*options.arguments, *(text for text in rest if _is_shared(text))]
    rest = [*options.arguments, *rest]
    if not any(text.startswith("parallel.") for text in rest):
        rest, shared = [*rest, "parallel.dp=1"], [*shared, "parallel.dp=1"]  # so that several runs share the machine

    default = f"runs/gqa-{_name_of(source) if source else composition.config.name}"
    folder = checked("study.dir", default if settings.dir is None else settings.dir)
    if source is None:
        dir = folder / f"seed-{settings.seeds[0] if settings.seeds else 1}" / "pretrained"
        prepared = _checked([*rest, f"hydra.run.dir={quoted(dir.absolute())}"], problems)
    else:
        trial = [*rest, "uptrain.alpha=1.0", f"hydra.run.dir={quoted((folder / 'trial').absolute())}"]
        prepared = _checked(trial, problems, writes=False)
    sections = sections_of(settings, source is None)
    pretrain = [] if source else rest
    rate = composition.config.uptrain.rate
    study = Plan(settings, sections, prepared.config, prepared, folder, pretrain, source, shared, rate)
    if problems := _problems(study):
        raise BadInput(problems)
    return study


def _is_shared(override: str) -> bool:
    """Tell whether an override applies to every run, uptrainings included."""
    key = key_of(override)
    return any(key.startswith(one) if one.endswith(".") else key == one for one in _SHARED)


def _not_of_given(overrides: Sequence[str]) -> list[str]:
    """Say which overrides no uptraining of given weights would take, which have their recipe from these."""
    found = dict.fromkeys(key_of(text) for text in overrides if not _is_shared(text))
    return [
        f"{key}: {what}; leaving it out would work"
        for key in found
        if key not in _OF_GIVEN
        for what in ["is the original's" if key.partition(".")[0] in _RECIPE else "reaches no uptraining"]
    ]


def _name_of(source: Source) -> str:
    """Return the name of a run's folder, or that of other weights."""
    return (source.path.parents[1] if source.path.parent.name == CHECKPOINTS else source.path).name


def _checked(overrides: list[str], problems: list[str], writes: bool = True) -> PreparedRun:
    """Check that a run can start, and return it."""
    try:
        prepared = preflight(overrides, writes=writes)
    except BadInput as error:
        raise BadInput([*problems, *error.problems]) from None
    if problems:
        raise BadInput(problems)
    return prepared


def _problems(study: Plan) -> list[str]:
    """Return the problems of the study's own settings."""
    settings, config = study.settings, study.config
    found = path_problems("study.dir", study.folder) + problems_of_lists(settings)
    found += problems_of_model(settings, config.model, config.train.seq_len, study.source is None) + unmeasured(config)
    if not config.checkpoint.enabled:
        found.append("checkpoint.enabled=false: a study reads the weights of its runs; true would work")
    if Section.roofline in study.sections:
        try:
            cluster_of(settings.device)
        except BadInput as error:
            found += [problem.replace("--cluster=", "study.device=") for problem in error.problems]
    if found:
        return found
    steps: dict[int, float] = {}
    for alpha in settings.alphas:
        step = study.step_of(alpha)
        if step in steps:
            found.append(
                f"study.alphas={settings.alphas}: {steps[step]:g} and {alpha:g} are both {step} steps of training"
            )
        steps[step] = alpha
    return found or other_recipe("study.dir", study.folder, study.recipe)
