"""The trainings of a study: what each section needs, pretrained first, then uptrained, several at a time."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

from launch.study.plan import Original, Plan, Uptraining
from launch.study.settings import Section
from launch.supervise import PASSED_ON
from launch.trainings.starts import Starter, Starts, starter
from launch.trainings.train_all import Training, train_all
from model.problems import BadInput
from model.regroup import Regrouped
from train import pretrained as trained
from train.pretrained import Source, open_source

SHARD_BYTES = 5 * 10**9
CALIBRATION_ROWS = 8
"""Training sequences by whose keys and values heads are compared."""
_BY_THE_USER = {0, *(128 + number for number in PASSED_ON)}
"""What `train_all` returns where it was told to stop."""


class KeptStarts:
    """Keeps what starts trainings from one call of `train_all` to the next: what it imports takes seconds."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._kept: dict[tuple[int, int | None], Starter] = {}

    @contextmanager
    def __call__(self, ranks: int, at_once: int | None) -> Iterator[Starter]:
        """Yield what is there for so many ranks, or make it."""
        if (ranks, at_once) not in self._kept:
            self.close()
            self._kept[ranks, at_once] = self._stack.enter_context(starter(ranks, at_once))
        yield self._kept[ranks, at_once]

    def close(self) -> None:
        """End what starts trainings, and what still runs."""
        self._kept.clear()
        self._stack.close()


class SectionTrainings:
    """Trains what sections need, once each.

    Args:
        study: its plan.
        wanted: the uptrainings of each section, their `before` included or not.
        say: the function that reports progress.
        starts: what starts trainings.

    Attributes:
        failed: why a section's trainings have failed, by section.
    """

    def __init__(
        self,
        study: Plan,
        wanted: Mapping[Section, Sequence[Uptraining]],
        say: Callable[[str], None],
        starts: Starts,
    ):
        self._study, self._say, self._starts = study, say, starts
        self._wanted = {section: with_those_before(runs) for section, runs in wanted.items()}
        self._sources: dict[Path, Source] = {}
        self._why: dict[Path, str] = {}  # by folder, of the trainings that have failed
        self.failed: dict[Section, str] = {}

    @property
    def cost(self) -> tuple[int, int, int]:
        """The number of all trainings, of those that are not done, and the tokens of those."""
        study = self._study
        runs = dict.fromkeys(run for runs in self._wanted.values() for run in runs)
        length = {study.training(run, Path()): run.steps[-1] * study.step_tokens for run in runs}
        if study.source is None:
            originals = dict.fromkeys(run.original for run in runs)
            length |= {study.pretraining(original): study.tokens for original in originals}
        left = [tokens for training, tokens in length.items() if not training.is_done]
        return len(length), len(left), sum(left)

    def pretrainings(self) -> dict[Section, list[Training]]:
        """Return the pretrainings that each section needs: of the models themselves before the smaller ones."""
        if self._study.source is not None:
            return {}
        found = {}
        for section, runs in self._wanted.items():
            originals = sorted({run.original for run in runs}, key=lambda one: (one.smaller, one.seed))
            found[section] = [self._study.pretraining(original) for original in originals]
        return found

    def run(self) -> int | None:
        """Train all; return None, or the exit code where it was told to stop."""
        if (code := self._train(self.pretrainings())) is not None:
            return code
        for level in range(1, 1 + max((run.level for runs in self._wanted.values() for run in runs), default=0)):
            groups: dict[Section, list[Training]] = {}
            for section, runs in self._wanted.items():
                if section not in self.failed:
                    try:
                        groups[section] = [self._training(run) for run in runs if run.level == level]
                    except BadInput as error:
                        self._fails(section, "; ".join(error.problems))
            if (code := self._train(groups)) is not None:
                return code
        return None

    def _train(self, groups: Mapping[Section, Sequence[Training]]) -> int | None:
        """Train all together; if one fails, the rest section by section, so that it takes no other section with it.

        What has failed is not trained again: the sections that need it fail for the same reason.
        """
        together = {training.run_dir: training for group in groups.values() for training in group}
        code, why = self._all(list(together.values()))
        if code in _BY_THE_USER or (code is None and not why):
            return code
        for section, group in groups.items():
            if not all(training.is_done for training in group):
                folders = [training.run_dir.absolute() for training in group]
                if known := [self._why[folder] for folder in folders if folder in self._why]:
                    self._fails(section, known[0])
                    continue
                code, why = self._all(group)
                if code in _BY_THE_USER:
                    return code
                if why:
                    self._fails(section, why)
        return None

    def _all(self, trainings: Sequence[Training]) -> tuple[int | None, str]:
        """Train; return what `train_all` does, and why it failed if it has."""
        failed: list[Training] = []
        at_once = self._study.settings.parallel_runs
        try:
            code = train_all(trainings, at_once=at_once, say=self._say, start=self._starts, failed=failed.append)
        except BadInput as error:
            return None, "; ".join(error.problems)
        why = f"a training ended with exit code {code}" if code else ""
        self._why |= dict.fromkeys([training.run_dir.absolute() for training in failed], why)
        return code, why

    def _fails(self, section: Section, why: str) -> None:
        self.failed[section] = why
        self._say(f"{section.value}: {why}; the other sections go on")

    def _training(self, run: Uptraining) -> Training:
        """Return an uptraining, after writing the weights that it begins with."""
        study = self._study
        if study.training(run, Path()).is_done:
            return study.training(run, Path())
        return study.training(run, weights(study, run, self._source))

    def _source(self, path: Path) -> Source:
        if path not in self._sources:
            self._sources[path] = open_source(path)
        return self._sources[path]


def with_those_before(runs: Sequence[Uptraining]) -> list[Uptraining]:
    """Return uptrainings with those that they build on, each once."""
    found: dict[Uptraining, None] = {}
    for run in runs:
        chain = [run]
        while chain[-1].before:
            chain.append(chain[-1].before)
        found |= dict.fromkeys(reversed(chain))
    return list(found)


def weights(study: Plan, run: Uptraining, open_at: Callable[[Path], Source] = open_source) -> Path:
    """Return the weights an uptraining begins with, after regrouping the heads where they are not the original ones.

    Args:
        study: its plan.
        run: the uptraining.
        open_at: opens the weights at a path.
    """
    if run.method is None:
        return study.path_of(run.original)
    folder = study.weights(run)
    if not folder.exists():
        before = study.result(run.before, run.before.alphas[-1]) if run.before else study.path_of(run.original)
        source = open_at(before)
        rows = calibration_rows(study) if run.method.by_similarity else None
        regrouped = Regrouped(source.weights, run.kv_heads, run.method, run.original.seed, rows)
        with trained.new_folder(folder) as unfinished:
            trained.write_checkpoint(regrouped, source, unfinished, SHARD_BYTES)
    return folder


def calibration_rows(study: Plan) -> torch.Tensor:
    """Return training sequences, int64 (B, L), evenly spaced over each source's."""
    seq_len, by_name = study.config.train.seq_len, study.prepared.data.by_name
    rows = []
    for data in by_name.values():
        sequences = data.train(seq_len)
        number = min(math.ceil(CALIBRATION_ROWS / len(by_name)), len(sequences))
        rows += [sequences[int(at)][:seq_len] for at in np.linspace(0, len(sequences) - 1, number)]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def uptrainings_of(study: Plan, seed: int, smaller: bool = False) -> list[Uptraining]:
    """Return the uptrainings, by the first method, that most sections compare, of one seed."""
    original = Original(seed, smaller)
    heads = [study.model.n_kv_heads] if smaller else study.kv_heads
    return [run for n in heads for run in study.compared(original, n)]
