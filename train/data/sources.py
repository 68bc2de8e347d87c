"""The prepared corpora of a run, one or several, and what a run of a given length takes of each."""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from conf.schema import Config
from conf.train_settings import Packing, corpora
from model.problems import BadInput
from train.data.best_fit import summary
from train.data.mixed_order import HeldOutSamples, MixedOrder, held_out_mixture, mixtures_of, own_weights
from train.data.prepare import PreparedData, prepare_sources
from train.learning_rate import length_key
from train.length import Consumed, Length, length_of, stage_seq_len

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class PreparedSources:
    """The corpora that a run trains on, tokenised alike.

    Attributes:
        by_name: each under its name in `data.sources`; the one of a run without a mixture, under its kind.
    """

    by_name: dict[str, PreparedData]

    @property
    def _any(self) -> PreparedData:
        return next(iter(self.by_name.values()))

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hash of all that shaped each corpus, by name."""
        return {name: data.fingerprint for name, data in self.by_name.items()}

    @property
    def fingerprint(self) -> str:
        """That of the only corpus, or one of all of them; runs with the same one saw the same tokens."""
        if len(self.by_name) == 1:
            return self._any.fingerprint
        return hashlib.sha256(json.dumps(self.fingerprints, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json that all were tokenised with."""
        return self._any.tokenizer_path

    @property
    def eos_id(self) -> int:
        """The token after every document."""
        return self._any.eos_id

    @property
    def num_train_tokens(self) -> int:
        """Training tokens of all, end tokens included."""
        return sum(data.num_train_tokens for data in self.by_name.values())

    @property
    def num_val_tokens(self) -> int:
        """Held-out tokens of all, end tokens included."""
        return sum(data.num_val_tokens for data in self.by_name.values())

    def tokenizer(self) -> "Tokenizer":
        """Load the tokenizer that the corpora were tokenised with."""
        return self._any.tokenizer()

    def held_out(self, config: Config) -> HeldOutSamples:
        """Open the held-out sequences, of train.seq_len tokens."""
        mixture = held_out_mixture(config)
        return HeldOutSamples({name: self.by_name[name].val(config.train.seq_len) for name in mixture.names}, mixture)

    def packed(self, config: Config) -> list[str]:
        """Pack the documents of a run, where that is more than to concatenate them; say what came of it, by source."""
        said = []
        lengths = dict.fromkeys(stage_seq_len(config, stage) for stage in range(max(1, len(config.data.stages))))
        for name, data in self.by_name.items():
            if data.packing is Packing.best_fit:
                of = f"{name}: " if len(self.by_name) > 1 else ""
                said += [of + summary(*data.best_fit(seq_len)) for seq_len in lengths]
        return said

    def below(self, cache: Path) -> "PreparedSources":
        """Return the same as they lie in another folder of prepared corpora."""

        def moved(data: PreparedData) -> PreparedData:
            folder = cache / data.fingerprint
            return replace(data, folder=folder, tokenizer_path=folder / data.tokenizer_path.name)

        return PreparedSources({name: moved(data) for name, data in self.by_name.items()})


def prepare_run(config: Config, *, progress: bool = True, verify: bool = False) -> PreparedSources:
    """Tokenise the corpora of a run whose settings are sound, or find them tokenised.

    Args:
        config: of the run.
        progress: show progress bars on stderr.
        verify: compare all of the prepared tokens with their checksums, not only what was touched.

    Raises:
        BadInput: with all problems found: those of `prepare_sources`, a source without one sequence of a stage's
            length, and two sources that are the same corpus.
    """
    of = corpora(config.data)
    prepared = PreparedSources(
        prepare_sources(of, config.model.vocab_size, config.train.seq_len, progress=progress, verify=verify)
    )
    problems = []
    for index, stage in enumerate(config.data.stages):
        for name in mixtures_of(config)[index].names:
            tokens, seq_len = prepared.by_name[name].num_train_tokens, stage_seq_len(config, index)
            if tokens <= seq_len:
                problems.append(
                    f"data.stages[{index}].seq_len={stage.seq_len}: source {name} has only {tokens:,} training tokens "
                    f"and one sequence takes {seq_len + 1:,}; a larger corpus or a shorter length would work"
                )
    seen: dict[str, str] = {}
    for name, fingerprint in prepared.fingerprints.items():
        if (other := seen.setdefault(fingerprint, name)) != name:
            problems.append(
                f"data.sources.{name}: the same documents as data.sources.{other}, which would come in the same order "
                "twice; one source with the sum of their weights would work"
            )
    if problems:
        raise BadInput(problems)
    prepared.packed(config)
    return prepared


@dataclass(frozen=True)
class Share:
    """What a run takes of a source.

    Attributes:
        name: of the source.
        tokens: that the run trains on.
        available: training tokens of the source.
        epochs: how often the source's sequences are gone through by the end, what was passed over included.
        max_epochs: the most that the settings allow; None where they set no limit.
    """

    name: str
    tokens: int
    available: int
    epochs: float
    max_epochs: float | None


def shares(config: Config, data: PreparedSources, begun: Consumed | None = None) -> list[Share]:
    """Compute what a run takes of each source up to its last step.

    Args:
        config: of the run, sound.
        data: its corpora.
        begun: what was trained on before the settings held; None for nothing.
    """
    begun = begun or Consumed(skip=config.train.skip_samples)
    length = length_of(config, begun)
    order, samples = MixedOrder.of(config, length, begun), length.samples_after(length.steps)
    tokens, positions = order.source_tokens(samples), order.positions(samples)
    limits = {name: source.max_epochs for name, source in config.data.sources.items()}
    found = []
    for name, corpus in data.by_name.items():
        epochs = sum(
            places[name] / max(1, len(corpus.train(seq_len)))
            for seq_len, places in positions.items()
            if places.get(name)
        )
        found.append(Share(name, tokens.get(name, 0), corpus.num_train_tokens, epochs, limits.get(name)))
    return found


def too_often(config: Config, found: list[Share]) -> list[str]:
    """Say which sources a run would go through more often than their `max_epochs` allow, in a sentence each."""
    problems = []
    whole = sum(share.tokens for share in found)
    own = own_weights(config.data)
    for share in found:
        if share.max_epochs is None or share.epochs <= share.max_epochs:
            continue
        key, works = f"data.sources.{share.name}", [f"max_epochs={_up(share.epochs):g}"]
        most = share.tokens / whole * share.max_epochs / share.epochs
        weight = (sum(own.values()) - own[share.name]) * most / (1 - most) if most < 1 else 0.0
        # With one stage, and nothing trained on before, the epochs are in proportion to the weight.
        even = share.epochs * share.available < 1.01 * share.tokens + 1
        if weight and even and not any(stage.weights is not None for stage in config.data.stages):
            works.insert(0, f"weight={_down(weight):.2g}")
        problems.append(
            f"{key}.max_epochs={share.max_epochs:g}: the run takes {share.tokens:,} tokens of {share.name}, which are "
            f"{share.epochs:.4g} epochs of its {share.available:,}; {' or '.join(f'{key}.{one}' for one in works)}, or "
            "a shorter run, would work"
        )
    return problems


def repeated(config: Config, data: PreparedSources, found: list[Share], length: Length) -> list[str]:
    """Warn of shares that had to be rounded, and sources that a run goes through more than once, in a sentence each."""
    key, train = length_key(config, length), config.train
    said = [
        f"{f'data.stages[{index}]' if config.data.stages else 'data.sources'}: {rounding}"
        for index, mixture in enumerate(mixtures_of(config))
        if (rounding := mixture.rounding())
    ]
    if len(found) > 1 or length.varies or config.data.stages:
        return said + [
            f"{key}: {share.epochs:.1f} epochs of source {share.name}, of which the run takes {share.tokens:,} tokens "
            f"and which has {share.available:,}; more of it, a smaller weight or a shorter run repeats less"
            for share in found
            if share.epochs >= 1.01
        ]
    (corpus,) = data.by_name.values()
    size, num_sequences = length.at(length.steps), len(corpus.train(train.seq_len))
    batch, samples = size.global_batch, length.samples_after(length.steps)
    if samples - num_sequences < batch <= num_sequences:
        return []
    return [
        f"{key}: {samples / num_sequences:.1f} epochs, since {length.steps:,} steps of train.global_batch={batch} take "
        f"{samples:,} sequences and the corpus has {num_sequences:,} of train.seq_len={train.seq_len}; a larger corpus "
        "or a shorter run repeats less"
    ]


def _down(value: float) -> float:
    """Round down to two digits."""
    last = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.floor(value / last) * last


def _up(value: float) -> float:
    """Round up to two digits after the point."""
    return math.ceil(value * 100) / 100


def table(found: list[Share]) -> str:
    """Render what a run takes of each source as lines of text."""
    whole = sum(share.tokens for share in found) or 1
    width = max(len(share.name) for share in found)
    return "\n".join(
        f"{share.name:{width}}  {share.tokens:>20,} tokens, {share.tokens / whole:6.2%}; {share.epochs:.3g} epochs of "
        f"{share.available:,}" + (" (repeated)" if share.epochs > 1 else "")
        for share in found
    )
