"""Preflight: all checks that need no process or device, and the preparation of what a run needs.

Rank 0 does it for all. What can be otherwise on another host, its devices, its environment and its copy of the data,
one rank judges there.
"""

import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from conf.compose import Composition
from conf.eval_settings import task_specs
from conf.paths import expanded, name_problems, path_problems, unwritable
from conf.schema import Config
from conf.train_settings import corpora
from conf.validate import Machine, validate, warnings
from model.problems import BadInput
from parallel import environment, interfaces
from parallel.layout import Layout
from parallel.processes import local_processes
from train import alerts, hosts, passed_over, predicted, uptrain, wandb_check
from train.checkpoint import history, resume
from train.checkpoint.folder import step_of
from train.checkpoint.resume import Start
from train.data import cache
from train.data.prepare import check_sources
from train.data.sources import PreparedSources, prepare_run, repeated, shares, too_often
from train.evaluate import continuation, sets, tasks
from train.events import RESTART
from train.fit import judged, smallest_gpu_bytes
from train.hosts import SharedFacts
from train.learning_rate import warnings as length_warnings
from train.length import length_of
from train.pretrained import Source
from train.records import SUMMARY
from train.started import LOCK
from train.uptrain import compose_with_source


@dataclass(frozen=True)
class PreparedRun:
    """A run that is checked and can start.

    Attributes:
        config: all settings, sound.
        composition: what they were taken from, with Hydra's own.
        layout: the rank grid.
        data: tokenised, on disk.
        sets: the held-out sets of `eval.sets`, as well.
        run_dir: where the run writes.
        arguments: the command's, after the overrides that its `init_from` implies.
        source: the weights it begins with, None for new ones.
        start: the checkpoint it goes on from.
        complete: what to say if nothing is left to do, else None.
        warnings: what may not be what was meant, one sentence each.
    """

    config: Config
    composition: Composition
    layout: Layout
    data: PreparedSources
    sets: PreparedSources
    run_dir: Path
    arguments: list[str]
    source: Source | None
    start: Start
    complete: str | None
    warnings: list[str]


def preflight(
    arguments: Sequence[str],
    *,
    machine: Machine | None = None,
    writes: bool = True,
    verify: bool = False,
) -> PreparedRun:
    """Compose, validate, and prepare the data, which runs once for all processes and is cached.

    Args:
        arguments: as on Hydra's command line: overrides, ``--config-dir`` and ``--config-name``.
        machine: to judge the layout by; None is the machine this runs on, as the launcher's environment describes it.
        writes: whether the run folder is this process's to write, and so to judge.
        verify: compare all of the prepared tokens with their checksums, not only what was touched.

    Raises:
        BadInput: with every problem found.
    """
    composition, source, arguments = compose_with_source(arguments, checked=writes)
    config = composition.config
    machine = machine or this_machine()
    layout, problems = validate(config, machine)
    problems += uptrain.problems(config, source)
    problems += _environment_problems(machine, config)
    unfit, tight = judged(config, layout.world_size, machine.gpu_bytes) if layout and not problems else ([], [])
    problems += unfit
    run_dir, start, notes = composition.run_dir.absolute(), Start(), list[str]()
    problems += sets.problems(config.data, config.eval.sets)
    if writes:
        # A task that is gone while a run goes on does not end it.
        (notes if os.environ.get(RESTART) else problems).extend(_task_problems(config))
        problems += predicted.problems(config) + alerts.problems(config.alerts)
        problems += wandb_check.problems(config, run_dir, os.environ)
        unusable = name_problems("name", config.name) or _check_run_dir(composition.run_dir)
        problems += [problem for problem in unusable if problem not in problems]
        try:
            if not unusable:
                if run_dir.is_dir():
                    with locked(run_dir):
                        pass
                start = resume.find(config.resume, run_dir)
                problems += resume.check(config, start)
        except BadInput as error:
            problems += error.problems
    if problems or composition.problems or layout is None:
        raise BadInput(composition.all_problems([*problems, *check_sources(corpora(config.data))]))
    if config.data.document_mask is None:
        config.data.document_mask, note = resume.trained_with_document_mask(start)
        notes += [note] if note else []
    # It checks the corpus itself: of 100,000 files on a shared disk, one look is enough.
    data = prepare_run(config, verify=verify)
    if problems := resume.check(config, start, data.tokenizer_path) or uptrain.other_tokenizer(source, data):
        raise BadInput(problems)
    if any(spec.given == "continuation" for spec in task_specs(config.eval.tasks)[0]):
        problems = continuation.problems(data.by_name, config)
        if problems and RESTART not in os.environ:
            raise BadInput(problems)
        notes += problems
    begun = history.begun(config, resume.newest(start), data.fingerprints)
    length, of_sources = length_of(config, begun), shares(config, data, begun)
    if problems := too_often(config, of_sources) + passed_over.last_step_problems(config, length):
        raise BadInput(problems)
    complete = _complete(config, composition.run_dir, start)
    return PreparedRun(
        config,
        composition,
        layout,
        data,
        _prepared_sets(config, data, verify),
        run_dir=composition.run_dir,
        arguments=arguments,
        source=source,
        start=start,
        complete=complete,
        warnings=notes
        + tight
        + warnings(config, layout, machine)
        + uptrain.warnings(config, source)
        + repeated(config, data, of_sources, length)
        + length_warnings(config, length)
        + passed_over.warnings(config, length)
        + (wandb_check.warnings(config, os.environ) if writes else []),
    )


def preflight_here(prepared: PreparedRun, of_rank_0: SharedFacts, *, judges: bool) -> PreparedRun:
    """Take over on another host what rank 0 has prepared; return it with the data as this host has them.

    The corpus, the checkpoint and the weights to begin with are not read again. Only where the prepared data lie on a
    disk that rank 0 does not share are they prepared here as well, which is said.

    Args:
        prepared: by rank 0.
        of_rank_0: what this host has to have the same.
        judges: whether this process is the one of its host that judges; others rely on it, and wait for it.

    Raises:
        BadInput: with every problem of this host.
    """
    config, host = prepared.config, socket.gethostname()
    data, of_sets = (one.below(expanded(config.data.cache_dir)) for one in (prepared.data, prepared.sets))
    if not judges:
        return replace(prepared, data=data, sets=of_sets)
    machine = this_machine()
    problems = validate(config, machine)[1] + _environment_problems(machine, config) + hosts.problems(of_rank_0)
    problems += judged(config, prepared.layout.world_size, machine.gpu_bytes)[0]
    if prepared.source and not prepared.source.path.is_dir():
        problems.append(f"init_from={prepared.source.path}: not there; a path that all hosts share would work")
    try:
        if not all(cache.sound(one.folder) for of in (data, of_sets) for one in of.by_name.values()):
            folder = expanded(config.data.cache_dir)
            said = f"{host}: the corpus that rank 0 has prepared is not in {folder} here, and is prepared here as well"
            print(said, file=sys.stderr)
            data = prepare_run(config)
            of_sets = _prepared_sets(config, data)
        if data.fingerprint != prepared.data.fingerprint:
            problems.append("data: another corpus or tokenizer than on rank 0's host; the same files would work")
        if of_sets.fingerprint != prepared.sets.fingerprint:
            problems.append("eval.sets: other documents than on rank 0's host; the same files would work")
        data.packed(config)
    except BadInput as error:
        problems += error.problems
    if problems:
        raise BadInput([f"{problem} (on {host})" for problem in problems])
    return replace(prepared, data=data, sets=of_sets)


def _prepared_sets(config: Config, data: PreparedSources, verify: bool = False) -> PreparedSources:
    """Tokenise the sets of `eval.sets` with the run's tokenizer, or find them tokenised."""
    sizes = config.model.vocab_size, config.train.seq_len
    return sets.prepare_sets(config.data, config.eval.sets, data.tokenizer_path, *sizes, verify=verify)


def _task_problems(config: Config) -> list[str]:
    """Read the tasks of a run, and find what is wrong with them."""
    return tasks.check(task_specs(config.eval.tasks)[0], tasks.Asked.of(config))


def _environment_problems(machine: Machine, config: Config) -> list[str]:
    """Judge the environment that the ranks have, or will inherit."""
    problems = environment.problems(os.environ, config.parallel.pp) if machine.gpus else []
    if machine.local_processes and machine.processes:  # the ranks are here
        problems += interfaces.problems(os.environ, several_hosts=machine.processes > machine.local_processes)
        if too_few := environment.file_limit_problem(machine.processes):
            problems.append(too_few)
    try:
        environment.timeout()
    except BadInput as error:
        problems += error.problems
    return problems


def _complete(config: Config, run_dir: Path, start: Start) -> str | None:
    """Say that a run has taken all its steps already; None where it has not."""
    if not start.own or start.rewind:
        return None
    length = length_of(config, history.begun(config, resume.newest(start)))
    newest = step_of(start.candidates[0]) or 0
    try:
        summary = json.loads((run_dir / SUMMARY).read_text("utf-8"))
        done = summary["steps"] if summary["complete"] else 0
    except (OSError, ValueError, KeyError, TypeError):
        done = 0
    if newest > length.steps:  # complete or not, there is no step between here and the end
        done = newest
    if min(done, newest) < length.steps:
        return None
    further = "a higher train.max_steps goes on from there, " if length.steps < length.schedule_steps else ""
    return f"{run_dir}: complete, {done:,} of {length.steps:,} steps; {further}resume=never trains it again"


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Lock a run folder while it is written, as far as its file system can; it is made where it is not there.

    Raises:
        BadInput: another process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / LOCK, timeout=1.0)  # `deepnarrow runs` holds it for an instant to see whether it is held
    try:
        lock.acquire()
    except Timeout:
        works = "a folder of its own (hydra.run.dir=…, or name=…), or waiting for the other to end, would work"
        raise BadInput([f"{run_dir}: another process is training in this run folder; {works}"]) from None
    except (NotImplementedError, OSError):  # a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()


def this_machine() -> Machine:
    """Count the GPUs here, and the processes that a launcher has started, by the environment it sets."""
    processes = os.environ.get("WORLD_SIZE")
    return Machine(
        gpus=torch.cuda.device_count(),
        local_processes=local_processes(),
        processes=int(processes) if processes else None,
        gpu_bytes=smallest_gpu_bytes(torch.cuda.device_count()),
    )


def _check_run_dir(run_dir: Path) -> list[str]:
    """Check that the run folder is one or can be made; nothing is made."""
    if problems := path_problems("hydra.run.dir", run_dir):
        return problems
    why = unwritable(run_dir)
    return [f"hydra.run.dir={run_dir}: {why}; a folder that can be written would work"] if why else []
