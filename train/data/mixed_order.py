"""Which sequence of which source the n-th sample of a run is, through all data stages, and what has been seen by then.

The samples have places in an order, one after another, but for places that `train.skip_samples_at` passes over: there
the next sample has the next place that is not among them.

Within a stage, the sources take turns as `Mixture` lays down, and each gives its sequences in a `SampleOrder` of its
own, seeded alike for all. From one stage to the next each source goes on where it was. Sequences of another length are
other sequences: each length has its own order, which begins with its first epoch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from conf.ranges import ranges_of
from conf.schema import Config
from conf.train_settings import DataConfig, corpora
from train.data.mixture import Mixture
from train.data.order import SampleOrder
from train.data.packing import Sequences
from train.data.prepare import PreparedData
from train.length import Consumed, Length

Located = list[tuple[Sequences, int]]
"""Samples: for each the sequences of a source, and which of them it is."""


@dataclass(frozen=True)
class _Stretch:
    """Consecutive samples of one mixture and length: `skip` samples are passed over before the first."""

    first: int
    start: int
    """The place at which the stretch begins; `first` is the number of the first sample."""
    seq_len: int
    mixture: Mixture
    skip: int
    base: dict[str, int]
    """Position of each source before those that are passed over."""

    def counts(self, place: int) -> NDArray[np.int64]:
        """Count the places of each source up to one of the run's, in the order of the mixture's names."""
        return self.mixture.counts(place - self.start + self.skip)

    def positions(self, place: int) -> dict[str, int]:
        """Return where each source stands before a place."""
        pairs = zip(self.mixture.names, self.counts(place).tolist(), strict=True)
        return self.base | {name: self.base.get(name, 0) + count for name, count in pairs}


class MixedOrder:
    """The order of a run's samples.

    Args:
        length: of the run: where its stages begin.
        mixtures: of each stage.
        begun: what was trained on before these settings held.
        passed: places that no sample has, in order and apart; those before `begun.place` are past.
    """

    def __init__(self, length: Length, mixtures: Sequence[Mixture], begun: Consumed, passed: Sequence[range] = ()):
        self._begun, self._stretches = begun, list[_Stretch]()
        self._passed = [range(max(one.start, begun.place), one.stop) for one in passed if one.stop > begun.place]
        self._totals = np.cumsum([0, *map(len, self._passed)])
        self._borders = np.array([one.start for one in self._passed], np.int64) - self._totals[:-1] - begun.passed
        stage, skip = -1, begun.skip
        for span in length.planned():
            size = span.first
            if size.stage == stage:
                continue
            stage = size.stage
            positions, start = self.positions(size.samples_before), self._end(size.samples_before)
            base = positions.get(size.seq_len, {})
            self._stretches.append(_Stretch(size.samples_before, start, size.seq_len, mixtures[stage], skip, base))
            skip = 0

    @staticmethod
    def of(config: Config, length: Length, begun: Consumed) -> "MixedOrder":
        """Return the order of a run with sound settings."""
        return MixedOrder(length, mixtures_of(config), begun, ranges_of(config.train.skip_samples_at))

    def places(self, samples: ArrayLike) -> NDArray[np.int64]:
        """Return the places of samples in the order, by their numbers in the run, (n,)."""
        wanted = np.asarray(samples, dtype=np.int64)
        passed = self._totals[np.searchsorted(self._borders, wanted, side="right")]
        return wanted + self._begun.passed + passed

    def take(self, samples: ArrayLike) -> tuple[int, list[str], NDArray[np.int64]]:
        """Look up samples that are all of one stage.

        Args:
            samples: their numbers in the run, (n,), from the first on that the settings decide.

        Returns:
            The length of their sequences, the name of each one's source, and its place in the order of that source.
        """
        wanted = np.asarray(samples, dtype=np.int64)
        stretch = self._of(int(wanted.min()))
        sources, positions = stretch.mixture.take(self.places(wanted) - stretch.start + stretch.skip)
        base = np.array([stretch.base.get(name, 0) for name in stretch.mixture.names], dtype=np.int64)
        return stretch.seq_len, [stretch.mixture.names[k] for k in sources], base[sources] + positions

    def shares(self, sample: int) -> dict[str, str]:
        """Return the share of each source in the mixture that a sample is of, as exact fractions."""
        return {name: str(share) for name, share in self._of(sample).mixture.shares.items()}

    def positions(self, samples: int) -> dict[int, dict[str, int]]:
        """Return where the order of each source stands before a sample, by sequence length and name."""
        found = {seq_len: dict(of) for seq_len, of in self._begun.positions.items()}
        for stretch, end in self._until(samples):
            found[stretch.seq_len] = found.get(stretch.seq_len, {}) | stretch.positions(end)
        return found

    def source_tokens(self, samples: int) -> dict[str, int]:
        """Count the tokens of each source that are trained on before a sample; none of those that are passed over."""
        found = dict(self._begun.source_tokens)
        for stretch, end in self._until(samples):
            counts = stretch.counts(end) - stretch.counts(stretch.start)
            for one in _within(self._passed, stretch.start, end):
                counts = counts - (stretch.counts(one.stop) - stretch.counts(one.start))
            for name, count in zip(stretch.mixture.names, counts.tolist(), strict=True):
                found[name] = found.get(name, 0) + count * stretch.seq_len
        return found

    def passed_over(self, samples: int) -> list[tuple[range, dict[str, range]]]:
        """Return the places that are passed over before a sample, each stretch of them with those of its sources."""
        found = []
        for stretch, end in self._until(samples):
            for one in _within(self._passed, stretch.start, end):
                before, after = stretch.positions(one.start), stretch.positions(one.stop)
                of = {name: range(before[name], after[name]) for name in stretch.mixture.names}
                found.append((one, {name: places for name, places in of.items() if places}))
        return found

    def consumed(self, length: Length, step: int) -> Consumed:
        """Return what is trained on in the first so many steps, of which the settings decide at least the last."""
        samples = length.samples_after(step)
        skip = self._begun.skip if samples == self._begun.samples else 0
        passed = self._end(samples) - samples
        return Consumed(length.taken(step), self.positions(samples), skip, self.source_tokens(samples), passed)

    def _end(self, samples: int) -> int:
        """Return the place behind the last of the first so many samples."""
        return int(self.places(samples - 1)) + 1 if samples > self._begun.samples else self._begun.place

    def _of(self, sample: int) -> _Stretch:
        return next(stretch for stretch in reversed(self._stretches) if stretch.first <= sample)

    def _until(self, samples: int) -> list[tuple[_Stretch, int]]:
        """List the stretches that begin before a sample, each with the place of its end, or the sample's if that
        comes first."""
        ends = [stretch.first for stretch in self._stretches[1:]]
        pairs = zip(self._stretches, [*ends, samples], strict=False)
        return [(stretch, self._end(min(end, samples))) for stretch, end in pairs if stretch.first < samples]


def _within(ranges: Sequence[range], start: int, end: int) -> list[range]:
    """Return the ranges between two places that none of them crosses."""
    return [one for one in ranges if start <= one.start and one.stop <= end]


class TrainSamples:
    """The samples of a run, over the prepared tokens of its sources.

    Args:
        order: of the samples.
        data: of each source, by name.
        seed: of the sources' orders.
    """

    def __init__(self, order: MixedOrder, data: Mapping[str, PreparedData], seed: int):
        self._order, self._data, self._seed = order, data, seed
        self._opened: dict[tuple[int, str], tuple[Sequences, SampleOrder]] = {}

    def locate(self, samples: ArrayLike) -> Located:
        """Find samples, all of one stage, by their numbers in the run, (n,)."""
        seq_len, names, _, indices = self.named(samples)
        return [(self._open(seq_len, name)[0], int(index)) for name, index in zip(names, indices, strict=True)]

    def named(self, samples: ArrayLike) -> tuple[int, list[str], NDArray[np.int64], NDArray[np.int64]]:
        """Return, of samples as `locate` finds them, their length in tokens, and of each its source by name, its place
        in the order of that source, and which of the source's sequences it is."""
        seq_len, names, places = self._order.take(samples)
        indices = np.empty_like(places)
        for name in set(names):
            chosen = np.array([one == name for one in names])
            indices[chosen] = self._open(seq_len, name)[1].take(places[chosen])
        return seq_len, names, places, indices

    def _open(self, seq_len: int, name: str) -> tuple[Sequences, SampleOrder]:
        if (seq_len, name) not in self._opened:
            sequences = self._data[name].train(seq_len)
            self._opened[seq_len, name] = sequences, SampleOrder(len(sequences), self._seed)
        return self._opened[seq_len, name]


class HeldOutSamples:
    """The held-out sequences of the sources, in the shares of a mixture and in the order in which they lie there.

    They end where the first source of the mixture has no more.

    Args:
        sequences: of each source that the mixture names.
        mixture: of the sources.
    """

    def __init__(self, sequences: Mapping[str, Sequences], mixture: Mixture):
        self._sequences, self._mixture = [sequences[name] for name in mixture.names], mixture
        self._ends = {name: mixture.index_of(k, len(sequences[name])) for k, name in enumerate(mixture.names)}

    def __len__(self) -> int:
        return min(self._ends.values())

    @property
    def first_to_end(self) -> str:
        """The source that has the fewest for its share."""
        return min(self._ends, key=self._ends.__getitem__)

    def locate(self, samples: ArrayLike) -> Located:
        """Find samples by their numbers, (n,), below the length."""
        sources, places = self._mixture.take(samples)
        return [(self._sequences[k], int(place)) for k, place in zip(sources, places, strict=True)]


def mixtures_of(config: Config) -> list[Mixture]:
    """Return the mixture of each data stage of a sound configuration; one where there are no stages."""
    own = own_weights(config.data)
    return [Mixture(own if stage.weights is None else stage.weights) for stage in config.data.stages] or [Mixture(own)]


def held_out_mixture(config: Config) -> Mixture:
    """Return the mixture to validate on: by the sources' own weights, or, where those are all 0, the first stage's."""
    own = own_weights(config.data)
    return Mixture(own) if any(own.values()) else mixtures_of(config)[0]


def own_weights(data: DataConfig) -> dict[str, float]:
    """Return the weight that each source has by itself."""
    return {name: source.weight for name, source in data.sources.items()} or dict.fromkeys(corpora(data), 1.0)
