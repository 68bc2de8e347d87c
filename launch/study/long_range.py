"""How models use what lies far back: loss by position in the context, recall of pairs, and a passage that comes again.

All three are log-likelihoods of tokens, by `parallel.scoring`, on the same tokens for every model:

- The loss of held-out tokens by how many tokens come before them (arXiv 2001.08361, appendix D.5).
- Associative recall, several queries to a sequence as in Zoology (arXiv 2312.04927): ``k1 v1 … kn vn``, then held-out
  text in which keys come again, each once and without its value. After a key, is its value the likeliest of those that
  were shown? Each sequence is read a second time with every key's value moved on to the next key, so that what a model
  finds likely after a key anyway cancels out.
- A needle: a held-out passage, other held-out text, and the passage again. How much lower is the loss of the passage's
  second reading, behind its first few tokens, than in the same sequence without the first?

A distance is the number of tokens from a key, or from where a passage begins, to where it comes again.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.bench.common import device_here
from model.batch import Batch
from model.loss import IGNORED
from model.problems import BadInput
from model.weights import Weights
from parallel.layout import Layout
from parallel.scoring import Request, load_scorer
from train.evaluate.held_out import requests_of

PROMPTS, PASSAGES = 32, 16
"""The number of sequences of pairs, each of which is read twice, and of passages."""
MEASURES = ("loss", "accuracy", "advantage", "gain")
_PAIRS = 8
_PASSAGE = 32
_DISTANCES = 6
"""The most distances that are measured, evenly spaced on a logarithmic scale."""
_FREQUENT = 256
"""Keys and values are drawn from so many of the most frequent tokens of held-out documents."""
_LEAST = 16
"""The shortest context that a prompt of two pairs fits, with room between them and their queries."""


@dataclass(frozen=True)
class Probe:
    """Requests, and what their scores say at each of some points.

    Attributes:
        points: of positions or distances, ascending.
        requests: whose scores `sums` reads.
        sums: the function from the log-likelihoods of the requests, fp64 (N,), to a sum and a count of what is
            measured, fp64 (S, P) each, for each of S samples at each of P points, by measure.
    """

    points: tuple[int, ...]
    requests: list[Request]
    sums: Callable[[np.ndarray], dict[str, tuple[np.ndarray, np.ndarray]]]


def long_range_findings(
    models: Mapping[str, Weights],
    batches: Sequence[Batch],
    seed: int,
    say: Callable[[str], object],
    *,
    never: Collection[int] = (),
    prompts: int = PROMPTS,
    passages: int = PASSAGES,
) -> dict[str, Any]:
    """Measure how each model uses what lies far back; one model is in memory at a time.

    Args:
        models: the weights by the name of the model, in the order in which they are to be shown. Others are compared
            with the first.
        batches: held-out rows, int64 (B, L) each, L the context in which all is measured. A row without any label is
            padding. At least two rows have labels.
        seed: of the prompts: the same seed and rows make the same prompts.
        say: the function that reports progress.
        never: tokens that no pair is made of, such as the end of a document.
        prompts, passages: the number of sequences of pairs, and of passages.

    Returns:
        A dict for JSON: the sizes ``context``, ``rows``, ``prompts``, ``pairs``, ``passages``, ``passage`` and ``cue``
        (the tokens of the second reading that are not scored); ``drawn_from_text``, prompts whose text has so many
        different tokens that keys or values had to be drawn from those; ``chance`` of each measure that has one;
        ``points``, the positions (each the least number of tokens before one, up to the next) or distances of each
        measure; and ``models``, a list of ``name``, ``attention``, ``kv_heads``, ``window``, ``without``, the loss of
        passages that were not seen before, and a list with ``mean`` and standard ``error`` for each point of each
        measure, with ``above`` and ``above_error``, how far it is above the first model's on the same samples; None
        where they are no numbers:

        - ``loss``: of held-out tokens, nats;
        - ``accuracy``: the share of queries whose value is likelier than the other values of its sequence; of K that
          are the likeliest alike, each counts 1 / K;
        - ``advantage``: how much likelier a value is than the value of the next key where it is its key's than where
          the other is, half the difference of the two differences of log-likelihoods, nats: what a model that copies
          finds the copied value likelier than others, and 0 for one that does not recall;
        - ``gain``: how much lower the loss of the second reading is than without the first, nats per token.

    Raises:
        BadInput: the rows are too few or too short, or have too few different tokens.
    """
    rows_NL = rows_of(batches)
    if problems := problems_of(rows_NL):
        raise BadInput(problems)
    generator = np.random.default_rng(seed)
    pairs, drawn_from_text = recall_probe(rows_NL, prompts, generator, never)
    passage = needle_probe(rows_NL, passages, generator)
    probes = [position_probe(batches), pairs, passage]
    context = rows_NL.shape[1]
    found: list[dict[str, Any]] = []
    firsts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for number, (name, weights) in enumerate(models.items(), 1):
        say(f"long range of {name}, {number} of {len(models)}")
        sums = scored(weights, probes)
        config = weights.config
        one = {"name": name, "attention": config.attention_name, "kv_heads": config.n_kv_heads}
        without, _ = _mean_and_error(*sums.pop("without"))
        one |= {"window": config.window, "without": float(without[0])}
        firsts = firsts or sums
        found.append(one | {measure: _series(*of, *firsts[measure]) for measure, of in sums.items()})
    points = zip(MEASURES, (probes[0], pairs, pairs, passage), strict=True)
    return {
        "context": context,
        "rows": len(rows_NL),
        "prompts": prompts,
        "pairs": num_pairs(context),
        "drawn_from_text": drawn_from_text,
        "passages": passages,
        "passage": passage_length(context),
        "cue": _cue(context),
        "chance": {"accuracy": 1 / num_pairs(context), "advantage": 0.0, "gain": 0.0},
        "points": {measure: list(probe.points) for measure, probe in points},
        "models": found,
    }


def rows_of(batches: Sequence[Batch]) -> np.ndarray:
    """Return the tokens of the rows that have labels, int64 (N, L)."""
    rows = [batch.tokens[(batch.labels != IGNORED).any(1)].numpy() for batch in batches]
    return np.concatenate(rows)


def problems_of(rows_NL: np.ndarray) -> list[str]:
    """Say why prompts cannot be made of held-out rows, in a sentence each."""
    (rows, context), found = rows_NL.shape, []
    if context < _LEAST:
        found.append(f"train.seq_len={context}: too short to recall pairs in; at least {_LEAST} would work")
    if rows < 2:
        found.append(
            f"train.val_sequences={rows}: a passage of one held-out sequence is read in another; at least 2 would work"
        )
    return found


def num_pairs(context: int) -> int:
    """Return the number of pairs of a sequence: at most a quarter of it is pairs."""
    return min(_PAIRS, context // 8)


def passage_length(context: int) -> int:
    """Return the number of tokens of a passage: at most an eighth of the context."""
    return max(2, min(_PASSAGE, context // 8))


def _cue(context: int) -> int:
    return max(1, passage_length(context) // 4)


def scored(weights: Weights, probes: Sequence[Probe]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Score the requests of probes by a model, on a GPU in bf16; return their sums and counts by measure."""
    scorer = load_scorer(weights, Layout(dp=1, pp=1), *device_here())
    scores = scorer.score([request for probe in probes for request in probe.requests])
    values_N, at = np.array([one.log_likelihood for one in scores]), 0
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for probe in probes:
        found |= probe.sums(values_N[at : at + len(probe.requests)])
        at += len(probe.requests)
    return found


def position_probe(batches: Sequence[Batch]) -> Probe:
    """Ask for the loss of held-out tokens, by the number of tokens before them in their document or row.

    The points are the borders of bins, each a root of two further than the last. A sample is a document or row.
    """
    wholes = [request.tokens for batch in batches for request in requests_of(batch)]
    longest = max(len(whole) for whole in wholes)
    roots = {round(2 ** (half / 2)) for half in range(2 * longest.bit_length())}
    points = sorted(roots & {1, *range(2, longest - 1)})  # the last bin is more than the last token
    ends = [*points[1:], longest]
    places = [
        (sample, bin, Request(whole[:end], begin))
        for sample, whole in enumerate(wholes)
        for bin, (begin, end) in enumerate(zip(points, ends, strict=True))
        if begin < len(whole)
    ]
    samples, bins = (np.array(of) for of in zip(*((sample, bin) for sample, bin, _ in places), strict=True))
    counts_SP = np.zeros((len(wholes), len(points)))
    counts_SP[samples, bins] = [len(request.tokens) - request.first for _, _, request in places]

    def sums(values_N: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        nats_SP = np.zeros_like(counts_SP)
        nats_SP[samples, bins] = -values_N
        return {"loss": (nats_SP, counts_SP)}

    return Probe(tuple(points), [request for _, _, request in places], sums)


def recall_probe(
    rows_NL: np.ndarray, prompts: int, generator: np.random.Generator, never: Collection[int] = ()
) -> tuple[Probe, int]:
    """Ask which of the shown values follows a key, at growing distance, by two pairings of the same keys and values.

    Keys and values are frequent tokens that do not occur in the text between; where too few are left, the rarest that
    do occur are taken too.

    Args:
        rows_NL: held-out rows, int64 (N, L); the text is one of them.
        prompts: the number of sequences, each with a query at every distance, and read twice.
        generator: of keys, values, which key is asked for at which distance, and the text.
        never: tokens that no pair is made of.

    Returns:
        The probe, and the number of sequences in which tokens of the text were taken.

    Raises:
        BadInput: there are not as many different tokens.
    """
    context, pairs = rows_NL.shape[1], num_pairs(rows_NL.shape[1])
    distances = _spaced(2 * pairs, context - 2 * pairs, min(_DISTANCES, pairs))
    numbers_V = np.bincount(rows_NL.ravel())
    numbers_V[[token for token in never if token < len(numbers_V)]] = 0
    by_number = np.argsort(-numbers_V, kind="stable")[: np.count_nonzero(numbers_V)]
    if len(by_number) < 2 * pairs:
        works = "more or other held-out documents would work"
        raise BadInput([f"held-out rows: {len(by_number)} different tokens make less than {pairs} pairs; {works}"])
    requests, answers, taken = [], np.zeros((prompts, len(distances)), dtype=int), 0
    for prompt in range(prompts):
        row_L = rows_NL[generator.integers(len(rows_NL))].copy()
        occurs = np.isin(by_number, row_L[2 * pairs :])
        pool = by_number[~occurs][:_FREQUENT]
        if len(pool) < 2 * pairs:
            pool = np.concatenate([pool, by_number[occurs][::-1][: 2 * pairs - len(pool)]])
            taken += 1
        row_L[: 2 * pairs] = generator.choice(pool, 2 * pairs, replace=False)
        values = row_L[1 : 2 * pairs : 2].tolist()
        keys_P, places_P = _queries(distances, pairs, generator)
        row_L[places_P] = row_L[2 * keys_P]
        answers[prompt] = keys_P
        for moved in (0, 1):
            row_L[1 : 2 * pairs : 2] = np.roll(values, moved)
            tokens = row_L.tolist()
            requests += [Request([*tokens[: place + 1], value], place + 1) for place in places_P for value in values]

    def sums(values_N: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        values_2SPn = np.moveaxis(values_N.reshape(prompts, 2, len(distances), pairs), 1, 0)
        likeliest_2SPn = values_2SPn == values_2SPn.max(3, keepdims=True)
        rights_2SP = np.stack([answers, (answers - 1) % pairs])  # moved on, a key has the value of the key before it
        shares_2SPn = likeliest_2SPn / np.maximum(likeliest_2SPn.sum(3, keepdims=True), 1)
        accuracy_SP = _at(shares_2SPn, rights_2SP).sum(0)
        less_2SP = _at(values_2SPn, rights_2SP) - _at(values_2SPn, rights_2SP[::-1])
        one_SP = np.ones(answers.shape)
        return {"accuracy": (accuracy_SP, 2 * one_SP), "advantage": (less_2SP.sum(0) / 2, one_SP)}

    return Probe(distances, requests, sums), taken


def _at(values_2SPn: np.ndarray, chosen_2SP: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values_2SPn, chosen_2SP[..., None], axis=3)[..., 0]


def _queries(distances: Sequence[int], pairs: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw which key is asked for at each distance, and so where, int64 (P,) each; there is text between any two."""
    while True:  # the keys in their order are such a draw
        keys_P = generator.permutation(pairs)[: len(distances)]
        places_P = 2 * keys_P + np.array(distances)
        if np.diff(np.sort(places_P)).min(initial=2) >= 2:
            return keys_P, places_P


def needle_probe(rows_NL: np.ndarray, passages: int, generator: np.random.Generator) -> Probe:
    """Ask for the loss of a passage's second reading, with the first at growing distance and without it.

    Args:
        rows_NL: held-out rows, int64 (N, L), N at least 2; a passage is from another row than the text around it.
        passages: the number of passages, each read at every distance.
        generator: of passages and texts.
    """
    context = rows_NL.shape[1]
    length, cue = passage_length(context), _cue(context)
    distances = _spaced(length, context - length, _DISTANCES)
    requests = []
    for _ in range(passages):
        text, other = generator.choice(len(rows_NL), 2, replace=False)
        begin = generator.integers(context - length + 1)
        passage = rows_NL[other, begin : begin + length]
        again = context + 1 - length
        without = np.concatenate([rows_NL[text, :again], passage])
        for distance in (None, *distances):
            tokens = without.copy()
            if distance is not None:
                tokens[again - distance : again - distance + length] = passage
            requests.append(Request(tokens.tolist(), again + cue))

    def sums(values_N: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        values_SR = values_N.reshape(passages, 1 + len(distances))
        counts_SR = np.full(values_SR.shape, float(length - cue))
        gains_SP = values_SR[:, 1:] - values_SR[:, :1]
        return {"gain": (gains_SP, counts_SR[:, 1:]), "without": (-values_SR[:, :1], counts_SR[:, :1])}

    return Probe(distances, requests, sums)


def _spaced(first: int, last: int, most: int) -> tuple[int, ...]:
    """Return whole numbers from the first to the last, evenly spaced on a logarithmic scale."""
    return tuple(sorted({round(one) for one in np.geomspace(first, last, most)}))


def _mean_and_error(sums_SP: np.ndarray, counts_SP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ratio of sums to counts over samples, and its standard error, (P,) each.

    The error is that of a ratio estimate, which is the usual one of a mean where all samples count alike; NaN where
    there are fewer than two samples.
    """
    total_P, samples_P = counts_SP.sum(0), (counts_SP > 0).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_P = sums_SP.sum(0) / total_P
        squares_P = np.square(sums_SP - mean_P * counts_SP).sum(0)
        return mean_P, np.sqrt(squares_P * samples_P / (samples_P - 1)) / total_P


def _series(
    sums_SP: np.ndarray, counts_SP: np.ndarray, first_sums_SP: np.ndarray, first_counts_SP: np.ndarray
) -> list[dict[str, float | None]]:
    assert np.array_equal(counts_SP, first_counts_SP)
    columns = [*_mean_and_error(sums_SP, counts_SP), *_mean_and_error(sums_SP - first_sums_SP, counts_SP)]
    names = ("mean", "error", "above", "above_error")
    return [
        {name: None if math.isnan(value) else value for name, value in zip(names, point, strict=True)}
        for point in zip(*(column.tolist() for column in columns), strict=True)
    ]
