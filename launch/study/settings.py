"""The settings of `deepnarrow gqa-study`, and its sections."""

import math
from dataclasses import dataclass, field, replace
from enum import Enum

from model.config import ModelConfig
from model.regroup import Method, problem_of

PLAIN = (Method.mean, Method.first, Method.random)
"""The methods that the paper compares (arXiv 2305.13245, section 3.3)."""


class Section(Enum):
    """A question of the study; results are in this order."""

    uptraining = "uptraining"
    """How much quality fewer heads cost, by method and by share of the tokens."""
    decode = "decode"
    """What they buy: seconds of a token, and quality against them."""
    smaller = "smaller"
    """Whether a smaller multi-head model would buy as much."""
    heads = "heads"
    """How many different patterns and values heads hold, before and after."""
    long_range = "long_range"
    """What becomes of recall and of loss far into the context."""
    windows = "windows"
    """Sliding windows together with grouping: quality against cache."""
    warm_starts = "warm_starts"
    """Groups by similarity, and grouping step by step, against neighbours by the first method."""
    roofline = "roofline"
    """When it pays: prefill and decoding under the roofline of a device and of this machine."""


@dataclass
class StudySettings:
    """The settings ``study.…``; every other override belongs to the pretraining, and those of layout, machine, logs and
    saves to every uptraining too. With init_from, overrides of the recipe are refused."""

    sections: list[Section] | None = None
    """What is asked: uptraining, decode, smaller, heads, long_range, windows, warm_starts, roofline. Null asks all, but
    smaller only where the study pretrains, since a smaller model is a pretraining of its own. Only what these need is
    trained."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Values of train.seed, each a pretraining of its own, from its initial weights to the order of its data. With
    init_from the original is one, and a seed is an order of the uptrainings' data alone: the first goes on where the
    original run stood, and the others, whose train.seed is as far from that run's as they are from the first, read
    what the original may have read before."""
    kv_heads: list[int] | None = None
    """The numbers of key/value heads to regroup to; null is every divisor of the model's own."""
    methods: list[Method] = field(default_factory=lambda: list(PLAIN))
    """The methods of regrouping by neighbours that are compared in uptraining: mean, first, random. Other sections
    regroup by the first of them."""
    warm_starts: list[Method] = field(default_factory=lambda: [one for one in Method if one.by_similarity])
    """The methods by similarity that are compared with the first of study.methods: similar, aligned, svd."""
    alphas: list[float] = field(default_factory=lambda: [0.02, 0.05, 0.1, 0.2])
    """The shares of the original tokens after which an uptraining is measured. Those above study.alpha are trained
    with the first seed and the first method alone."""
    alpha: float = 0.05
    """The one of these shares at which models are compared."""
    windows: list[str] | None = None
    """Sliding windows, as tokens or tokens:pattern, such as [1024,"1024:sssssf"] (model.window, model.window_pattern).
    Null is half and a quarter of train.seq_len, and the quarter with one block in three full."""
    smaller_layers: int | None = None
    """Layers of the smaller multi-head model; null is as many as have the cache of the grouped model with the most
    key/value heads."""
    contexts: list[int] = field(default_factory=lambda: [512, 2048, 8192])
    """The numbers of tokens before a decoded one."""
    batches: list[int] = field(default_factory=lambda: [1, 4, 16])
    """The numbers of sequences that are decoded together."""
    device: str = "h100"
    """The device of the roofline: a preset of conf/clusters, or a YAML file, as the key cluster."""
    parallel_runs: int | None = None
    """Runs at a time on this machine; null is as many as its cores, or GPUs, allow."""
    dir: str | None = None
    """The folder of the study; null is runs/gqa-NAME, by the pretraining's name."""


@dataclass(frozen=True)
class Window:
    """A window that models are uptrained with.

    Attributes:
        tokens: model.window.
        pattern: model.window_pattern; None where every block slides.
    """

    tokens: int
    pattern: str | None = None

    @staticmethod
    def read(text: str) -> "Window | None":
        """Read it as it stands in ``study.windows``; None where it is none."""
        tokens, colon, pattern = text.partition(":")
        if not (tokens.isascii() and tokens.isdecimal()) or (colon and not pattern):
            return None
        return Window(int(tokens), pattern or None)

    def __str__(self) -> str:
        return f"{self.tokens}:{self.pattern}" if self.pattern else str(self.tokens)


def windows_of(settings: StudySettings, model: ModelConfig, seq_len: int) -> list[Window]:
    """Return the windows of a study whose settings are sound."""
    if settings.windows is not None:
        return [window for text in settings.windows if (window := Window.read(text))]
    found = [Window(seq_len // 2), Window(seq_len // 4)]
    return [*found, Window(seq_len // 4, "ssf")] if model.n_layers >= 3 else found


def sections_of(settings: StudySettings, pretrains: bool) -> list[Section]:
    """Return the sections that a study has, in the order of `Section`."""
    asked = settings.sections
    if asked is None:
        return [one for one in Section if pretrains or one is not Section.smaller]
    return [one for one in Section if one in asked]


def problems_of_lists(settings: StudySettings) -> list[str]:
    """Say what cannot be, whatever the model, one sentence each with what would work."""
    found = []
    for key in ("contexts", "batches"):
        values = getattr(settings, key)
        if not values or min(values) < 1:
            found.append(f"study.{key}={values}: at least one number, each at least 1")
    if settings.sections == []:
        found.append(f"study.sections=[]: at least one of {', '.join(one.value for one in Section)}")
    for key in ("seeds", "alphas", "sections", "methods", "warm_starts", "windows", "kv_heads"):
        values = [one.value if isinstance(one, Enum) else one for one in getattr(settings, key) or []]
        if twice := [value for at, value in enumerate(values) if value in values[:at]]:
            found.append(f"study.{key}: {twice[0]} stands there twice; once would work")
    if not settings.seeds or min(settings.seeds) < 0:
        found.append(f"study.seeds={settings.seeds}: at least one number from 0 up, such as [1]")
    for key, are in (("methods", PLAIN), ("warm_starts", [one for one in Method if one.by_similarity])):
        names = ", ".join(one.value for one in are)
        if not (values := getattr(settings, key)) and key == "methods":
            found.append(f"study.methods=[]: at least one of {names}")
        if wrong := [one.value for one in values if one not in are]:
            found.append(f"study.{key}=[{','.join(wrong)}]: is compared elsewhere; {names} would work")
    if settings.parallel_runs is not None and settings.parallel_runs < 1:
        found.append(f"study.parallel_runs={settings.parallel_runs}: must be at least 1, or null for all cores or GPUs")
    alphas = settings.alphas
    if not alphas or not all(0 < alpha < math.inf for alpha in alphas):
        found.append(f"study.alphas={alphas}: at least one share above 0, such as 0.05")
    elif settings.alpha not in alphas:
        found.append(f"study.alpha={settings.alpha:g}: not one of study.alphas={alphas}")
    return found


def problems_of_model(settings: StudySettings, model: ModelConfig, seq_len: int, pretrains: bool) -> list[str]:
    """Say what a model cannot be made into, one sentence each with what would work."""
    found, sections = [], sections_of(settings, pretrains)
    for n in settings.kv_heads or []:
        if problem := problem_of(model, n):
            found.append(problem.replace("--kv-heads", "study.kv_heads"))
    if Section.windows in sections:
        found += [problem for text in settings.windows or [] if (problem := _window_problem(text, model, seq_len))]
        if settings.windows is None and seq_len < 4:
            found.append(f"train.seq_len={seq_len}: has no quarter; study.sections without windows would work")
    if Section.smaller in sections:
        if not pretrains:
            found.append(
                "study.sections: smaller pretrains a smaller model by the recipe of the original, which init_from "
                "takes the place of; the sections without it would work"
            )
        layers = settings.smaller_layers
        if layers is not None and not 0 < layers < model.n_layers:
            found.append(f"study.smaller_layers={layers}: must be 1 to {model.n_layers - 1}, fewer than the model's")
        elif layers is None and model.n_layers == 1:
            found.append("model.n_layers=1: no model has fewer layers; study.sections without smaller would work")
    return found


def _window_problem(text: str, model: ModelConfig, seq_len: int) -> str | None:
    """Say why a model cannot have a window, in a sentence; None where it can."""
    window, said = Window.read(text), f"study.windows=[{text}]: "
    if window is None:
        return f'{said}is no number of tokens; [{seq_len // 2}] or ["{seq_len // 2}:ssf"] would work'
    if window.tokens >= seq_len:
        return f"{said}hides nothing in train.seq_len={seq_len} tokens; a smaller one would"
    problems = replace(model, window=window.tokens, window_pattern=window.pattern).problems()
    return said + problems[0] if problems else None
