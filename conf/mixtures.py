"""Checks of mixtures, data stages and batch size ramp-ups: one sentence per problem, and what would work."""

import math
import re
from collections.abc import Mapping
from dataclasses import fields

from conf.nearest import nearest_names
from conf.ramp import Rung, rungs
from conf.schema import Config
from conf.train_settings import CorpusConfig, DataConfig, SourceConfig
from model.problems import either, nearest_multiples
from parallel import schedules
from parallel.layout import Layout


def length_problems(config: Config) -> list[str]:
    """Find what keeps the settings from saying how many tokens each step has, the layout apart."""
    return _ramp(config)[1] + stage_problems(config) + total_problems(config)


def batch_problems(config: Config, run_layout: Layout | None) -> list[str]:
    """Find sizes of batches that are none, or that the layout cannot cut, for every rung of a ramp-up."""
    train = config.train
    ramp, problems = _ramp(config)
    problems += [
        f"train.{key}={getattr(train, key)}: must be at least 1"
        for key in ("micro_batch", "seq_len", "val_sequences")
        if getattr(train, key) < 1
    ]
    if problems or run_layout is None:
        return problems
    unit = train.micro_batch * run_layout.dp
    parallel = config.parallel
    runs = not schedules.problems(parallel.schedule, run_layout.pp, parallel.virtual_stages)
    for rung in ramp:
        said, key = f"train.global_batch={train.global_batch}", "train.global_batch"
        if len(ramp) > 1:
            said, key = f"{said}: its batch from {rung.tokens:,} tokens on, {rung.global_batch},", "a batch of"
        if rung.global_batch % unit:
            multiples = nearest_multiples(rung.global_batch, unit)
            works = either(key, multiples) if key != "a batch of" else f"{key} {' or '.join(map(str, multiples))}"
            is_not = f"{said}: not" if len(ramp) == 1 else f"{said} is not"
            problems.append(
                f"{is_not} divisible by train.micro_batch x dp = {train.micro_batch} x {run_layout.dp} = {unit}; "
                f"{works} would be"
            )
        elif runs:
            problems += schedules.batch_problems(parallel.schedule, run_layout.pp, rung.global_batch, unit)
    return problems


def source_problems(config: Config) -> list[str]:
    """Find sources and weights that make no mixture."""
    data, problems = config.data, []
    if not data.sources:
        return _single(data)
    defaults = CorpusConfig()
    for key in (each.name for each in fields(CorpusConfig)):
        if (value := getattr(data, key)) != getattr(defaults, key):
            name = next(iter(data.sources))
            problems.append(
                f"data.{key}={value}: stands beside data.sources, each of which has its own; data.sources.{name}.{key}="
                f"{value} would work, or data.sources={{}}"
            )
    for name, source in data.sources.items():
        problems += _source(f"data.sources.{name}", name, source)
    uses_own = not data.stages or any(stage.weights is None for stage in data.stages)
    weights = {name: source.weight for name, source in data.sources.items()}
    if uses_own and all(weight == 0 for weight in weights.values()):
        first = f"data.sources.{next(iter(weights))}.weight"
        problems.append(f"{first}=0: so are the weights of all sources; a weight above 0 for one would work")
    return problems


def warnings(config: Config) -> list[str]:
    """Warn of stages and batches that the run ends before, in one sentence each."""
    total = config.train.total_tokens
    late = [f"train.global_batch: its batch from {r.tokens:,} tokens on" for r in rungs(config.train.global_batch)
            if r.tokens >= total]  # fmt: skip
    begins = [stage.until for stage in config.data.stages[:-1]]
    late += [
        f"data.stages[{i}]: it begins at {until:g} tokens and" for i, until in enumerate(begins, 1) if until >= total
    ]
    return [f"{what} is never reached, since the run ends with train.total_tokens={total:g}" for what in late]


def _ramp(config: Config) -> tuple[list[Rung], list[str]]:
    value = config.train.global_batch
    try:
        ramp = rungs(value)
    except ValueError as error:
        return [], [f"train.global_batch={value}: {error}"]
    if any(rung.global_batch < 1 for rung in ramp):
        return ramp, [f"train.global_batch={value}: must be at least 1"]
    return ramp, []


def total_problems(config: Config) -> list[str]:
    """Find a length of the run that is none."""
    total = config.train.total_tokens
    return [] if 1 <= total < math.inf else [f"train.total_tokens={total}: must be at least 1 and finite, such as 2e12"]


def _single(data: DataConfig) -> list[str]:
    """Find stages that weigh sources where there are none."""
    return [
        f"data.stages[{index}].weights={dict(stage.weights)}: there are no data.sources to weigh; "
        f"data.stages[{index}].weights=null would work, or data.sources={{…}}"
        for index, stage in enumerate(data.stages)
        if stage.weights is not None
    ]


def _source(key: str, name: str, source: SourceConfig) -> list[str]:
    problems = []
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        problems.append(
            f"{key}: a name of letters, digits, _ and - would work, since it stands in overrides and in metrics.jsonl"
        )
    if source.source is None and source.path is not None and source.name is not None:
        problems.append(
            f"{key}: has a path and a name; {key}.source=files or {key}.source=hub would say which is meant"
        )
    if not 0 <= source.weight < math.inf:
        problems.append(f"{key}.weight={source.weight}: must be a finite number and at least 0, such as 0.7")
    if source.max_epochs is not None and not 0 < source.max_epochs < math.inf:
        problems.append(f"{key}.max_epochs={source.max_epochs}: must be above 0 and finite, or null for no limit")
    return problems


def stage_problems(config: Config) -> list[str]:
    """Find stages that are out of order, do not cover the run, or have weights or lengths that cannot be."""
    data, train, problems = config.data, config.train, []
    before = 0.0
    for index, stage in enumerate(data.stages):
        key = f"data.stages[{index}]"
        if not before < stage.until < math.inf:
            after = f"the {before:g} at which the stage before ends" if index else "0"
            problems.append(
                f"{key}.until={stage.until:g}: must be a finite number of tokens above {after}; stages in the order in "
                "which they end would work"
            )
        else:
            before = stage.until
        if stage.weights is not None and data.sources:
            problems += _weights(f"{key}.weights", stage.weights, data)
        if stage.seq_len is not None:
            problems += seq_len_problems(f"{key}.seq_len", stage.seq_len, config)
    if data.stages and not problems and before < train.total_tokens:
        last = f"data.stages[{len(data.stages) - 1}].until"
        problems.append(
            f"{last}={before:g}: the stages end before train.total_tokens={train.total_tokens:g}; {last}="
            f"{train.total_tokens:g} or one more stage would work, or train.total_tokens={before:g}"
        )
    return problems


def _weights(key: str, weights: Mapping[str, float], data: DataConfig) -> list[str]:
    problems = []
    for name, weight in weights.items():
        if name not in data.sources:
            near = nearest_names(name, data.sources)
            hint = f"did you mean {' or '.join(near)}? There" if near else "there"
            problems.append(f"{key}.{name}={weight:g}: no such source; {hint} are {', '.join(data.sources)}")
        elif not 0 <= weight < math.inf:
            problems.append(f"{key}.{name}={weight}: must be a finite number and at least 0, such as 0.7")
    if not problems and not any(weights.values()):
        name = next(iter(data.sources))
        problems.append(
            f"{key}={dict(weights)}: no source has a weight above 0; {key}.{name}=1 would work, or {key}=null"
        )
    return problems


def seq_len_problems(key: str, seq_len: int, config: Config) -> list[str]:
    """Find why sequences cannot have a length: the model's context, or the cut along the sequence."""
    problems = []
    if seq_len < 1:
        return [f"{key}={seq_len}: must be at least 1"]
    if seq_len > config.model.max_seq_len:
        problems.append(
            f"{key}={seq_len}: longer than the model's context, model.max_seq_len={config.model.max_seq_len}; lower "
            "the one or raise the other"
        )
    tp = config.parallel.tp
    if tp > 1 and config.parallel.sequence_parallel is not False and seq_len % tp:
        works = either(key, nearest_multiples(seq_len, tp))
        problems.append(
            f"{key}={seq_len}: sequence parallelism cuts it into parallel.tp={tp} even parts; {works} would work, or "
            "parallel.sequence_parallel=false"
        )
    return problems
