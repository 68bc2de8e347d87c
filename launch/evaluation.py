"""The command `deepnarrow eval`: trained weights measured as a run measures them, on one device or on several."""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
import torch.distributed as dist
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.compose import stored_config
from conf.eval_settings import TaskSpec, task_specs
from conf.schema import Config
from conf.train_settings import NamedCorpus
from launch.one_replica import is_first, joined, layout_problems, run_on_replica
from launch.speech import tokenizer_of
from model.problems import BadInput
from parallel.layout import Layout
from parallel.scoring import load_scorer
from train.agreement import checkpoint_group, from_rank_0
from train.data.sources import PreparedSources, prepare_run
from train.data.token_bytes import token_bytes
from train.data.tokenizer import eos_id, load_tokenizer
from train.evaluate import tasks
from train.evaluate.asking import OpenTasks
from train.evaluate.held_out import HeldOutSet, scored, sets_of_run, together
from train.evaluate.judged import lines
from train.evaluate.lead import Leader, led
from train.evaluate.sets import extra_sets, prepare_sets
from train.evaluate.sets import problems as set_problems
from train.evaluate.tasks import Asked, Figures, Speech
from train.job import computes_in_bf16
from train.pretrained import TOKENIZER, Source, open_source
from train.strict_json import dumps_flagged

HELD_OUT = "held-out"
"""Names the documents that a run has held out, among sets."""
_LONGEST = 4096
"""Tokens of a sequence of a set, for weights that no run of ours says the length of."""


@dataclass(frozen=True)
class Evaluation:
    """What is to be measured.

    Attributes:
        options: of the command.
        source: the weights.
        config: of the run; defaults for weights from elsewhere.
        own: the held-out sets of the run's documents.
        extra: further sets.
        specs: the tasks.
        asked: how they are asked.
        speech: of the model.
        layout: one replica.
    """

    options: argparse.Namespace
    source: Source
    config: Config
    own: list[HeldOutSet]
    extra: list[HeldOutSet]
    specs: list[TaskSpec]
    asked: Asked
    speech: Speech
    layout: Layout


def run(options: argparse.Namespace) -> int:
    """Measure trained weights; return 1 where a task has failed."""
    return run_on_replica(options, _evaluation, _measure)


def _evaluation(options: argparse.Namespace, checked: bool) -> Evaluation:
    """Read the command, and prepare what it asks for; `checked` reads the tasks as well.

    Raises:
        BadInput: with every problem found.
    """
    source = open_source(options.source, checked=checked)
    model, config = source.weights.config, _config(source)
    problems = layout_problems(options, model)
    problems += [
        f"--{key}={value}: must be at least {least}"
        for key, least in (("limit", 1), ("shots", 0))
        if (value := getattr(options, key)) is not None and value < least
    ]
    if options.out is not None and not options.out.parent.is_dir():
        problems.append(f"--out={options.out}: {options.out.parent} is no folder; a file in one that is would work")
    if source.tokenizer is None:
        raise BadInput([*problems, f"{source.path}: {TOKENIZER} is missing; beside the weights it would work"])
    as_run = options.tasks is None and options.sets is None
    specs, wrong = task_specs(config.eval.tasks if as_run else _listed(options.tasks, "--tasks"), "--tasks")
    problems += wrong
    asked = Asked.of(config)
    mine = {key: getattr(options, key) for key in ("limit", "shots", "include_path")}
    asked = replace(asked, **{key: value for key, value in mine.items() if value is not None})
    problems += tasks.check(specs, asked) if checked else []
    own, sets, wrong = _sets(options, config, source, as_run)
    problems += wrong + set_problems(config.data, sets, "--sets")
    if not (specs or own or sets or problems):
        problems = [f"{source.path}: says nothing that is to be measured; --tasks or --sets would"]
    needs_data = own or any(spec.given == "continuation" for spec in specs)
    if needs_data and source.described is not None:
        problems.append("--tasks=continuation: is made of the held-out documents of a run; a run folder would work")
    if problems:
        raise BadInput(problems)
    data = prepare_run(config, progress=checked) if needs_data else None
    sizes = model.vocab_size, config.train.seq_len
    prepared = prepare_sets(config.data, sets, source.tokenizer, *sizes, progress=checked, key="--sets")
    return Evaluation(
        options,
        source,
        config,
        sets_of_run(config, data) if own and data else [],
        extra_sets(config, prepared),
        specs,
        asked,
        _speech(source, data),
        Layout(dp=1, pp=options.pp, tp=options.tp),
    )


def _config(source: Source) -> Config:
    """Return the settings of the run that the weights are of; of those from elsewhere, the sizes of the model."""
    if source.run is not None and source.described is None and "data" in source.run.config:
        return stored_config(source.run.config)
    config = Config(model=source.weights.config)
    config.train.seq_len = min(_LONGEST, config.model.max_seq_len)
    config.data.val_fraction = 0.0
    return config


def _listed(given: Sequence[str] | None, key: str) -> list[Any]:
    """Read an option that may be repeated: names with commas between them, or a mapping in braces.

    Raises:
        BadInput: a mapping cannot be read.
    """
    found: list[Any] = []
    for one in given or []:
        if one.lstrip().startswith("{"):
            found.append(_mapping(one, f"{key}={one}"))
        else:
            found += [name for name in one.split(",") if name]
    return found


def _mapping(text: str, said: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise BadInput([f"{said}: cannot be read; {{path: FILE}} would work"]) from None


def _sets(
    options: argparse.Namespace, config: Config, source: Source, as_run: bool
) -> tuple[bool, dict[str, NamedCorpus], list[str]]:
    """Read which sets are asked for: whether the run's own, the others by name, and what is wrong with them."""
    is_run = source.run is not None and source.described is None
    if as_run:
        return is_run and config.data.val_fraction > 0, dict(config.eval.sets), []
    own, sets, problems = False, dict[str, NamedCorpus](), list[str]()
    for one in options.sets or []:
        name, equals, value = one.partition("=")
        if one == HELD_OUT and is_run:
            own = True
        elif not equals and name in config.eval.sets:
            sets[name] = config.eval.sets[name]
        elif not equals or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            there = [*([HELD_OUT] if is_run else []), *config.eval.sets, "NAME=PATH"]
            problems.append(f"--sets={one}: no such set; {' or '.join(there)} would work")
        else:
            made = _mapping(value, f"--sets={one}") if value.startswith("{") else {"path": value}
            try:
                merged = OmegaConf.merge(OmegaConf.structured(NamedCorpus), made)
                sets[name] = cast(NamedCorpus, OmegaConf.to_object(merged))
            except (OmegaConfBaseException, TypeError, ValueError):
                works = ", ".join(each.name for each in fields(NamedCorpus))
                problems.append(f"--sets={one}: {name}={{path: PATH}} would work; keys of a set are {works}")
    return own, sets, problems


def _speech(source: Source, data: PreparedSources | None) -> Speech:
    assert source.tokenizer is not None
    tokenizer, context = load_tokenizer(source.tokenizer), source.weights.config.max_seq_len
    end = eos_id(tokenizer, source.tokenizer)
    if source.described is None:
        return Speech.of_run(tokenizer, source.tokenizer, end, context, data)
    return Speech(tokenizer, str(source.tokenizer), tokenizer_of(source).encode, end, context)


def _measure(of: Evaluation) -> int:
    """Measure, all ranks together; rank 0 prints what comes of it. Returns the exit code."""
    began = time.monotonic()
    with joined(of.layout) as device:
        group = checkpoint_group() if of.layout.world_size > 1 else None  # a task may take long on rank 0
        bf16 = computes_in_bf16(of.config, on_gpus=device.type == "cuda")
        dtype = torch.bfloat16 if bf16 else torch.float32
        scorer = load_scorer(of.source.weights, of.layout, device, dtype)
        table = token_bytes(of.speech.tokenizer, of.speech.end)
        own, extra = (
            {one.name: scored(one, scorer.score, table, of.config.train.seq_len) for one in sets}
            for sets in (of.own, of.extra)
        )
        found: dict[str, Any] = {"source": str(of.source.path), "step": of.source.run and of.source.run.step}
        if own:
            whole = together([*own.values()])
            found |= {"val_loss": whole.mean, "val_bits_per_byte": whole.bits_per_byte}
        shown = {**(own if len(own) > 1 else {}), **extra}
        found["val_sets"] = {name: loss.figures() for name, loss in shown.items()}
        failed: dict[str, int] = {}
        if of.specs:
            found["tasks"] = led(scorer, of.source.weights.config, group, lambda leader: _ask(of, leader, failed))
        found |= {"failed_tasks": sorted(failed), "inexact_bytes": table.inexact}
        code = int(bool(failed))
        if group is not None:
            code = from_rank_0(code, group)
            dist.barrier(group)
    if is_first():
        _print(of.options, {**found, "seconds": time.monotonic() - began})
    return code


def _ask(of: Evaluation, leader: Leader, failed: dict[str, int]) -> dict[str, Figures]:
    def say(text: str, _: int) -> None:
        print(text, file=sys.stderr)

    opened = OpenTasks(of.specs, of.asked, of.speech, say, "the others are asked")
    figures = opened.ask(leader)
    failed |= {name: times for name, times in opened.failed.items() if name not in figures}
    return figures


def _print(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Print what was found, and write it to a file if that is asked for."""
    if options.json:
        print(dumps_flagged(found, indent=2))
    else:
        if "val_loss" in found:
            print(f"{HELD_OUT}: loss {found['val_loss']:.4f}, bits_per_byte {found['val_bits_per_byte']:.4f}")
        print("".join(f"{line}\n" for line in lines(found)), end="")
        if found["inexact_bytes"] and (found["val_sets"] or "val_loss" in found):
            print(f"bits per byte are not exact: of this tokenizer, {found['inexact_bytes']}", file=sys.stderr)
        print(f"took {found['seconds']:.1f} s")
    if options.out is not None:  # last: what a disk does not take has been printed
        options.out.write_text(dumps_flagged(found, indent=2) + "\n", "utf-8")
