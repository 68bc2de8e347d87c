"""Runs that begin with trained weights take over their shape, and an uptraining the recipe that made them.

What they imply is said as overrides that stand before the command's own: whatever the command says wins, and Hydra's
files in the run folder tell what was trained.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from conf.compose import Composition, compose_overrides, quoted
from conf.overrides import key_of
from conf.schema import Config, recipe_fields, to_jsonable
from conf.train_settings import Decay, Rate, ScheduleConfig
from conf.validate import Machine, validate
from model.problems import BadInput
from train.checkpoint import manifest
from train.checkpoint.manifest import Manifest
from train.data.sources import PreparedSources
from train.learning_rate import rate_share
from train.length import Consumed, Length, StepSize, length_by
from train.pretrained import Source, open_source

_NOT_SHAPE = ("attention",)
_SHAPE = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "vocab_size", "head_dim")
_RECIPE = ("data", "optimizer", "schedule", "train")
_MASK = "data.document_mask"


def compose_with_source(
    arguments: Sequence[str], *, checked: bool = True
) -> tuple[Composition, Source | None, list[str]]:
    """Compose a command's configuration; with `init_from` once more, since what that implies is said as overrides.

    Args:
        arguments: overrides and options, as for `conf.compose.compose_overrides`.
        checked: whether every file of the weights is read and checked.

    Returns:
        The composition, the weights at `init_from` (None for new ones), and the arguments after those that are implied.

    Raises:
        BadInput: with every problem of the overrides and of the weights, where the weights cannot be opened.
    """
    composition, arguments = compose_overrides(arguments), list(arguments)
    if composition.config.init_from is None:
        return composition, None, arguments
    try:
        source = open_source(composition.config.init_from, checked=checked, key="init_from")
        arguments = [*implied(composition.config, source, arguments), *arguments]
    except BadInput as error:
        raise BadInput(composition.all_problems(error.problems)) from None
    return compose_overrides(arguments), source, arguments


def sound(composition: Composition, source: Source | None) -> Config:
    """Return settings that would train on some machine, not necessarily this one.

    Args:
        composition: what they are composed of.
        source: the weights that they begin with, None for new ones.

    Raises:
        BadInput: with every problem.
    """
    _, problems = validate(composition.config, Machine(gpus=0, elsewhere=True))
    problems += other_shape(composition.config, source) if source else []
    if problems := composition.all_problems(problems):
        raise BadInput(problems)
    return composition.config


def implied(config: Config, source: Source, overrides: Sequence[str]) -> list[str]:
    """Write the overrides that `init_from` and `uptrain` stand for, without those that the command sets itself.

    Args:
        config: of the command alone.
        source: the weights at `init_from`.
        overrides: of the command.

    Raises:
        BadInput: an uptraining of weights whose recipe is not known.
    """
    given = {key_of(override) for override in overrides}
    described = to_jsonable(asdict(source.weights.config))
    values = {f"model.{key}": value for key, value in described.items() if key not in _NOT_SHAPE}
    if config.uptrain.alpha is not None:
        # A group that the command chooses (schedule=cosine) is a recipe of its own, but for what weights are used to
        # whatever the corpus: whether documents see each other.
        values |= {
            key: value
            for key, value in _recipe(config, source).items()
            if key == _MASK or key.partition(".")[0] not in given
        }
    if source.tokenizer and (config.uptrain.alpha is None or "data" in given):
        values["data.tokenizer"] = str(source.tokenizer)
    return [f"{key}={_hydra(value)}" for key, value in values.items() if key not in given]


def problems(config: Config, source: Source | None) -> list[str]:
    """Say why a run cannot begin with these weights, in a sentence each."""
    alpha, found = config.uptrain.alpha, []
    if alpha is not None and not 0 < alpha < math.inf:
        found.append(f"uptrain.alpha={alpha}: must be above 0, such as 0.05, or null for no uptraining")
    if source is None:
        if alpha is not None:
            found.append(f"uptrain.alpha={alpha}: there are no weights to train on; init_from=PATH would give some")
        return found
    if source.tokenizer is None and config.data.tokenizer is None:
        found.append(
            f"init_from={config.init_from}: has no tokenizer.json, and a vocabulary made of the corpus would number "
            "its tokens in another way; data.tokenizer=PATH of the one that the weights were trained with would work"
        )
    return found + other_shape(config, source)


def warnings(config: Config, source: Source | None) -> list[str]:
    """Warn of an uptraining that does not begin in the data exactly where the weights' run stood, in a sentence."""
    if config.uptrain.alpha is None or source is None or source.run is None or "data" not in source.run.config:
        return []
    stages, kept = source.run.config["data"].get("stages") or [], source.run.history
    if len(stages) < 2 and not (kept and kept["begun"]["steps"]):
        return []
    return [
        f"train.skip_samples={config.train.skip_samples}: the run that made the weights had several data stages, "
        "batches or mixtures, and this passes over its tokens as if all had been of the last; some may be passed over "
        "or come again"
    ]


def other_shape(config: Config, source: Source) -> list[str]:
    """Say where the model has another shape than the weights that it begins with, in a sentence each."""
    now, there = to_jsonable(asdict(config.model)), to_jsonable(asdict(source.weights.config))
    hint = "; deepnarrow regroup makes weights that have"
    return [
        f"model.{key}={now[key]}: the weights of init_from={config.init_from} have {there[key]}"
        + (f"{hint} {now[key]}" if key == "n_kv_heads" else f"; model.{key}={there[key]} would work")
        for key in _SHAPE
        if now[key] != there[key]
    ]


def other_tokenizer(source: Source | None, data: PreparedSources) -> list[str]:
    """Say, in a sentence, if the corpus is in other tokens than the weights know."""
    if source is None or source.tokenizer is None:
        return []
    if manifest.checksum(source.tokenizer) == manifest.checksum(data.tokenizer_path):
        return []
    return [f"data.tokenizer: not that of the weights; data.tokenizer={source.tokenizer} would work"]


def _recipe(config: Config, source: Source) -> dict[str, Any]:
    alpha = config.uptrain.alpha
    assert alpha is not None
    then = source.run.config if source.run else {}
    if missing := [section for section in _RECIPE if section not in then]:
        raise BadInput(
            [
                f"uptrain.alpha={alpha}: init_from={config.init_from} does not say what recipe made it (no "
                f"{missing[0]}); uptrain.alpha=null with train.total_tokens and the rest of a recipe would work"
            ]
        )
    assert source.run is not None
    values = {key: value for key, value in recipe_fields(then).items() if key.partition(".")[0] in _RECIPE}
    values |= {f"train.{key}": then["train"][key] for key in ("micro_batch", "val_every", "val_sequences")}
    done = source.run.tokens
    values["train.total_tokens"] = alpha * done
    length = _length(source.run)
    step = length.step_of(done)
    values |= _as_it_ended(then, length.at(max(1, step)))
    # Of a run with several lengths: the tokens that it trained on, in sequences of the last one.
    values["train.skip_samples"] = then["train"]["skip_samples"] + done // values["train.seq_len"]
    values["schedule.warmup_steps"] = math.ceil(alpha * then["schedule"]["warmup_steps"])
    if config.uptrain.rate is Rate.end:
        schedule = ScheduleConfig(**{**then["schedule"], "decay": Decay[then["schedule"]["decay"]]})
        share = rate_share(max(1, step), length, schedule)
        values["optimizer.lr"] = then["optimizer"]["lr"] * share
        values |= {"schedule.decay": "wsd", "schedule.decay_share": 0.0}  # warm up, then hold
    return values


def _length(run: Manifest) -> Length:
    """Return the length of the run that weights come from."""
    train = run.config["train"]
    stages = [(stage["until"], stage["seq_len"]) for stage in run.config["data"].get("stages") or []]
    begun = Consumed.from_json(run.history["begun"]) if run.history else None
    return length_by(train["global_batch"], train["seq_len"], stages, train["total_tokens"], begun=begun)


def _as_it_ended(then: Mapping[str, Any], size: StepSize) -> dict[str, Any]:
    """Write the batch, the length and the mixture of a run's last step as settings of a run that is one stage."""
    values: dict[str, Any] = {"train.global_batch": size.global_batch, "train.seq_len": size.seq_len}
    sources, stages = then["data"].get("sources") or {}, then["data"].get("stages") or []
    if stages and (weights := stages[size.stage]["weights"]) is not None:
        sources = {name: {**source, "weight": weights.get(name, 0.0)} for name, source in sources.items()}
    if stages:
        values["data.stages"] = []
    return {**values, "data.sources": sources} if sources else values


def _hydra(value: Any) -> str:
    """Write a value as Hydra's command line reads it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_hydra(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(_hydra(inner) for inner in value)}]"
    return quoted(value) if isinstance(value, str) else repr(value)
