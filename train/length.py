"""The length of a run: which step has how many sequences of how many tokens, as a function of its number."""

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from conf.ramp import rungs
from conf.schema import Config


def is_due(step: int, every: int | None, at: Sequence[int]) -> bool:
    """Tell whether what comes every so many steps (None or 0: never so), and after some, comes after a step."""
    return step in at or bool(every and step % every == 0)


@dataclass(frozen=True)
class StepSize:
    """What a step trains on.

    Attributes:
        samples_before, tokens_before: trained on before it.
        global_batch: its sequences, over all ranks.
        seq_len: tokens of a sequence.
        stage: of the data, counted from 0.
    """

    samples_before: int
    tokens_before: int
    global_batch: int
    seq_len: int
    stage: int

    @property
    def tokens(self) -> int:
        """Tokens that the step trains on."""
        return self.global_batch * self.seq_len


@dataclass(frozen=True)
class Steps:
    """Consecutive steps of one size.

    Attributes:
        count: of the steps.
        global_batch, seq_len: sequences of a step, and their tokens.
    """

    count: int
    global_batch: int
    seq_len: int


@dataclass(frozen=True)
class Consumed:
    """What a run has trained on up to a step: with the settings that hold from there on, it decides all that comes.

    Attributes:
        steps: that were taken, runs of equal ones together.
        positions: where each source's order stands, by sequence length and the name of the source.
        skip: samples to pass over before the next one.
        source_tokens: of each source, tokens trained on.
        passed: samples of the order that were passed over for `train.skip_samples_at`.
    """

    steps: tuple[Steps, ...] = ()
    positions: Mapping[int, Mapping[str, int]] = field(default_factory=dict)
    skip: int = 0
    source_tokens: Mapping[str, int] = field(default_factory=dict)
    passed: int = 0

    @property
    def step(self) -> int:
        """Steps taken."""
        return sum(steps.count for steps in self.steps)

    @property
    def samples(self) -> int:
        """Sequences trained on."""
        return sum(steps.count * steps.global_batch for steps in self.steps)

    @property
    def place(self) -> int:
        """The place in the order of samples, with which the run goes on."""
        return self.samples + self.passed

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return sum(steps.count * steps.global_batch * steps.seq_len for steps in self.steps)

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        steps = [[one.count, one.global_batch, one.seq_len] for one in self.steps]
        positions = {str(seq_len): dict(of) for seq_len, of in self.positions.items()}
        of_sources = {"positions": positions, "source_tokens": dict(self.source_tokens)}
        return {"steps": steps, **of_sources, "skip": self.skip, "passed": self.passed}

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> "Consumed":
        """Read what `as_json` has made."""
        positions = {int(seq_len): dict(of) for seq_len, of in found["positions"].items()}
        steps = tuple(Steps(*one) for one in found["steps"])
        return Consumed(steps, positions, found["skip"], dict(found["source_tokens"]), found.get("passed", 0))


@dataclass(frozen=True)
class Span:
    """Consecutive steps of one size and data stage, and where they stand in a run."""

    first: StepSize
    step: int
    """Number of the first of them, counted from 1."""
    count: int

    def at(self, step: int) -> StepSize:
        """Return the size of one of the steps, or of one that would follow them."""
        before, size = step - self.step, self.first
        samples = size.samples_before + before * size.global_batch
        tokens = size.tokens_before + before * size.tokens
        return StepSize(samples, tokens, size.global_batch, size.seq_len, size.stage)


@dataclass(frozen=True)
class Length:
    """The length of a run, step by step.

    A batch or a data stage that begins at some number of tokens begins with the first step before which at least so
    many have been trained on: a step is of one size and one stage.

    Attributes:
        spans: all steps that the schedule is spread over, in order.
        steps: to run: `schedule_steps`, or train.max_steps where that is less.
        first_planned: number of the first step that the settings decide; those before are as they were taken.
    """

    spans: tuple[Span, ...]
    steps: int
    first_planned: int = 1

    @property
    def schedule_steps(self) -> int:
        """Steps that train.total_tokens make, rounded up to whole ones."""
        return self.spans[-1].step + self.spans[-1].count - 1

    @property
    def tokens(self) -> int:
        """Tokens of all those steps."""
        return self.tokens_after(self.schedule_steps)

    @property
    def varies(self) -> bool:
        """Whether not all steps have as many tokens, in as many sequences."""
        return len({(span.first.global_batch, span.first.seq_len) for span in self.spans}) > 1

    def at(self, step: int) -> StepSize:
        """Return the size of a step, from 1 to schedule_steps; one beyond is as the last."""
        return self._span(step).at(step)

    def tokens_after(self, step: int) -> int:
        """Count the tokens trained on in the first so many steps."""
        return self._span(step).at(step + 1).tokens_before if step else 0

    def samples_after(self, step: int) -> int:
        """Count the sequences trained on in the first so many steps."""
        return self._span(step).at(step + 1).samples_before if step else 0

    def step_of(self, tokens: int) -> int:
        """Return the last step by which no more than so many tokens are trained on."""
        span = next((span for span in reversed(self.spans) if span.first.tokens_before <= tokens), self.spans[0])
        return span.step - 1 + (tokens - span.first.tokens_before) // span.first.tokens

    def progress(self, step: int) -> float:
        """Compute the share of all tokens that is trained on before a step."""
        return self.at(step).tokens_before / self.tokens

    def taken(self, step: int) -> tuple[Steps, ...]:
        """Return the first so many steps, runs of equal ones together."""
        found: list[Steps] = []
        for span in self.spans:
            count, size = min(span.count, step - span.step + 1), span.first
            if count < 1:
                break
            if found and (found[-1].global_batch, found[-1].seq_len) == (size.global_batch, size.seq_len):
                count += found.pop().count
            found.append(Steps(count, size.global_batch, size.seq_len))
        return tuple(found)

    def planned(self) -> Iterator[Span]:
        """Yield the spans whose data the settings decide."""
        return (span for span in self.spans if span.step >= self.first_planned)

    def _span(self, step: int) -> Span:
        return self.spans[max(0, bisect.bisect_right(self.spans, step, key=lambda span: span.step) - 1)]


def length_of(config: Config, begun: Consumed | None = None) -> Length:
    """Compute the length that a sound configuration asks for.

    Args:
        config: of the run.
        begun: what was trained on before these settings held; None for nothing.
    """
    train = config.train
    stages = [(stage.until, stage.seq_len) for stage in config.data.stages]
    return length_by(train.global_batch, train.seq_len, stages, train.total_tokens, train.max_steps, begun)


def length_by(
    global_batch: int | str,
    seq_len: int,
    stages: Sequence[tuple[float, int | None]],
    total_tokens: float,
    max_steps: int | None = None,
    begun: Consumed | None = None,
) -> Length:
    """Compute the length that single settings ask for: those of `TrainConfig`, and `until` and `seq_len` of stages."""
    ramp, total = rungs(global_batch), math.ceil(total_tokens)
    lengths = [own or seq_len for _, own in stages] or [seq_len]
    ends = [math.ceil(until) for until, _ in stages[:-1]]
    spans: list[Span] = []
    step, samples, tokens = 1, 0, 0

    def add(count: int, batch: int, seq_len: int, stage: int) -> None:
        nonlocal step, samples, tokens
        spans.append(Span(StepSize(samples, tokens, batch, seq_len, stage), step, count))
        step, samples, tokens = step + count, samples + count * batch, tokens + count * batch * seq_len

    for steps in begun.steps if begun else ():
        add(steps.count, steps.global_batch, steps.seq_len, 0)
    planned = step
    borders = [rung.tokens for rung in ramp[1:]] + ends
    while tokens < total:
        stage = bisect.bisect_right(ends, tokens)
        batch = next(rung.global_batch for rung in reversed(ramp) if rung.tokens <= tokens)
        until = min([border for border in borders if border > tokens] + [total])
        add(-(-(until - tokens) // (batch * lengths[stage])), batch, lengths[stage], stage)
    whole = step - 1
    return Length(tuple(spans), min(whole, max_steps or whole), planned)


def longest(config: Config) -> int:
    """Return the most tokens that a sequence of any data stage has."""
    return max(stage_seq_len(config, stage) for stage in range(max(1, len(config.data.stages))))


def stage_seq_len(config: Config, stage: int) -> int:
    """Return the tokens of a sequence in a data stage, by its index."""
    stages = config.data.stages
    return (stages[stage].seq_len if stages else None) or config.train.seq_len
