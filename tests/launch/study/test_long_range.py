"""Long range, of models and of scorers whose answers are known."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from launch.study import long_range
from launch.study.long_range import (
    long_range_findings,
    needle_probe,
    position_probe,
    problems_of,
    recall_probe,
    rows_of,
    scored,
)
from launch.study.long_range_pictures import draw_long_range, long_range_tables
from model.batch import Batch
from model.context import Context
from model.documents import documents_of
from model.loss import IGNORED
from model.problems import BadInput
from model.transformer import Transformer
from parallel.scoring import Score
from tests.launch.study.made import Made, held_out
from tests.shapes import small

V, L = 300, 64
QUIET = str


def findings(models, batches, seed=1, **options):
    return long_range_findings(models, batches, seed, QUIET, prompts=6, passages=5, **options)


class Copier:
    """A scorer that has an induction head: what followed the last token before, no further back than it reaches, it
    finds `SURE` times as likely as any other token.
    """

    SURE = 100.0

    def __init__(self, reach):
        self._reach = reach

    def score(self, requests):
        return [
            Score(sum(self._one(request.tokens, at) for at in range(request.first, len(request.tokens))), True)
            for request in requests
        ]

    def _one(self, tokens, at):
        before = [
            tokens[place + 1]
            for place in range(at - 1)
            if tokens[place] == tokens[at - 1] and at - 1 - place <= self._reach
        ]
        weight = self.SURE if before[-1:] == [tokens[at]] else 1.0
        return math.log(weight / (V + (self.SURE - 1 if before else 0)))


def by_copier(monkeypatch, reach, rows=8):
    monkeypatch.setattr(long_range, "load_scorer", lambda *of: Copier(reach))
    return findings({"copier": Made(small(2))}, [held_out(rows, L)])


def means(found, measure, model=0):
    return [point["mean"] for point in found["models"][model][measure]]


def test_a_model_without_an_opinion_loses_ln_v_everywhere_and_recalls_by_chance():
    found = findings({"even": Made(small(2), {"head.proj.weight": torch.zeros_like})}, [held_out(3, L)])
    assert found["pairs"] == 8 and found["chance"] == {"accuracy": 1 / 8, "advantage": 0.0, "gain": 0.0}
    for measure, expected in (("loss", math.log(V)), ("accuracy", 1 / 8), ("advantage", 0), ("gain", 0)):
        assert means(found, measure) == pytest.approx([expected] * len(found["points"][measure]), abs=1e-6)
        assert all(point["error"] == pytest.approx(0, abs=1e-6) for point in found["models"][0][measure])
    assert found["models"][0]["without"] == pytest.approx(math.log(V))


@pytest.mark.parametrize("reach", [L, 24, 5])
def test_what_copies_recalls_as_far_as_it_reaches_and_gains_by_what_it_has_read(monkeypatch, reach):
    found = by_copier(monkeypatch, reach)
    sure = math.log(Copier.SURE)
    distances = found["points"]["accuracy"]
    assert distances[0] == 16 and distances[-1] == L - 16 and found["points"]["advantage"] == distances
    assert means(found, "accuracy") == [1.0 if distance <= reach else 1 / 8 for distance in distances]
    assert means(found, "advantage") == pytest.approx([sure if distance <= reach else 0 for distance in distances])
    distances = found["points"]["gain"]
    assert distances[0] == found["passage"] == 8 and distances[-1] == L - 8
    gains = means(found, "gain")
    for distance, gain in zip(distances, gains, strict=True):
        # Random tokens come again by chance, in the text as well, so that copying what has been read is nearly all.
        assert gain > 0.6 * sure if distance <= reach else gain == pytest.approx(0, abs=0.6), (distance, gain)


def test_a_gain_is_the_difference_that_the_first_reading_makes(monkeypatch):
    """All tokens differ, so that nothing is copied but the passage: log(100 / (V + 99)) instead of log(1 / V)."""
    monkeypatch.setattr(long_range, "load_scorer", lambda *of: Copier(L))
    tokens = torch.arange(4 * (L + 1)).reshape(4, L + 1)
    (gain, counts), (without, _) = (
        scored(Made(small(2)), [needle_probe(tokens[:, :-1].numpy(), 5, np.random.default_rng(1))])[measure]
        for measure in ("gain", "without")
    )
    assert (counts == 8 - 2).all()
    np.testing.assert_allclose(gain / counts, math.log(100 * V / (V + 99)))
    np.testing.assert_allclose(without / 6, math.log(V))


def test_a_window_hides_what_lies_behind_it():
    """Two blocks of a window of 4 reach 6 tokens back: a first reading behind that changes nothing."""
    found = findings({"narrow": Made(small(2, window=4)), "wide": Made(small(2))}, [held_out(4, 32)])
    distances = found["points"]["gain"]
    assert distances[0] == 4 and distances[-1] == 28
    narrow, wide = ([abs(gain) > 1e-5 for gain in means(found, "gain", model)] for model in (0, 1))
    # The second of the four tokens is the first that is scored: from its place the passage ends distance - 3 before.
    assert narrow == [distance - 3 <= 6 for distance in distances] and all(wide)
    assert found["models"][0]["window"] == 4


@pytest.mark.parametrize("documents", [None, [5, 30]])
def test_loss_by_position_is_that_of_a_forward_pass(documents):
    batch = held_out(3, L)
    batch.labels[2, 40:] = IGNORED
    if documents:
        begins = torch.zeros(3, L, dtype=torch.bool)
        begins[:, documents] = True
        labels = batch.labels.clone()
        labels[:, [begin - 1 for begin in documents]] = IGNORED
        batch = Batch(batch.tokens, labels, documents_of(begins))
    made = Made(small(2))
    model = Transformer(made.config)
    model.load_state_dict({name: made.read(name) for name, _ in model.named_parameters()})
    with torch.no_grad():
        logits = model(batch.tokens, Context(documents=batch.documents))
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    losses, there = losses.view(3, L), batch.labels != IGNORED
    positions = batch.documents.positions_BL if documents else torch.arange(L).expand(3, L)
    found = findings({"one": made}, [batch])
    points = found["points"]["loss"]
    assert points == [point for point in (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45) if not documents or point < 34]
    for mean, begin, end in zip(means(found, "loss"), points, [*points[1:], L + 1], strict=True):
        of = there & (positions + 1 >= begin) & (positions + 1 < end)
        assert mean == pytest.approx(float(losses[of].mean()), rel=1e-5)


def test_recall_asks_for_each_value_by_the_models_own_likelihoods():
    made, rows = Made(small(2)), rows_of([held_out(3, L)])
    probe, _ = recall_probe(rows, 4, np.random.default_rng(1))
    found = scored(made, [probe])
    model = Transformer(made.config)
    model.load_state_dict({name: made.read(name) for name, _ in model.named_parameters()})
    by_query = np.array(probe.requests, dtype=object).reshape(4, 2, len(probe.points), 8)
    for sample in range(4):
        for point, distance in enumerate(probe.points):
            likelihoods, accuracy = [], 0
            for requests in by_query[sample, :, point]:
                prompt = requests[0].tokens[:-1]
                assert {tuple(request.tokens[:-1]) for request in requests} == {tuple(prompt)}
                assert {request.first for request in requests} == {len(prompt)}
                assert [request.tokens[-1] for request in requests] == by_query[sample, 0, 0, 0].tokens[1:16:2]
                key = prompt.index(prompt[-1])
                assert len(prompt) - 1 - key == distance
                with torch.no_grad():
                    likelihood = model(torch.tensor([prompt]))[0, -1].log_softmax(0)
                likelihoods.append(likelihood)
                accuracy += int(likelihood[prompt[1:16:2]].argmax() == key // 2)
            one, other = (requests[0].tokens[key + 1] for requests in by_query[sample, :, point])
            assert one != other
            advantage = (likelihoods[0][one] - likelihoods[0][other] + likelihoods[1][other] - likelihoods[1][one]) / 2
            assert found["advantage"][0][sample, point] == pytest.approx(float(advantage), abs=1e-4)
            assert (found["accuracy"][0][sample, point], found["accuracy"][1][sample, point]) == (accuracy, 2)


def test_pairs_are_of_tokens_that_the_text_does_not_have():
    rows = rows_of([held_out(9, L)])
    never = {int(token) for token in np.unique(rows)[::3]}
    probe, taken = recall_probe(rows, 20, np.random.default_rng(3), never)
    assert taken == 0
    for request in probe.requests:
        pairs, text = request.tokens[:16], request.tokens[16:-1]
        assert len(set(pairs)) == 16 and not never & set(pairs) and request.tokens[-1] in pairs[1::2]
        asked = Counter(token for token in text if token in pairs)
        assert set(asked) <= set(pairs[::2]) and set(asked.values()) == {1} and text[-1] in asked
    again, _ = recall_probe(rows, 20, np.random.default_rng(3), never)
    other, _ = recall_probe(rows, 20, np.random.default_rng(4), never)
    assert again.requests == probe.requests != other.requests
    keys = [request.tokens.index(request.tokens[-2]) for request in probe.requests[::8]]
    orders = {tuple(keys[at : at + 6]) for at in (0, 12, 24)}
    assert len(orders) == 3  # which key is asked for where is drawn


def test_tokens_of_the_text_are_taken_only_where_there_are_no_others_and_counted():
    few = held_out(4, L, vocab_size=20)
    probe, taken = recall_probe(rows_of([few]), 7, np.random.default_rng(1))
    assert taken == 7 and all(len(set(request.tokens[:16])) == 16 for request in probe.requests)
    with pytest.raises(BadInput, match=r"15 different tokens make less than 8 pairs; more or other held-out"):
        recall_probe(rows_of([held_out(4, L, vocab_size=15)]), 7, np.random.default_rng(1))
    found = long_range_findings({"one": Made(small(2))}, [few], 1, QUIET, prompts=2, passages=2)
    assert found["drawn_from_text"] == 2


def test_passages_are_read_again_at_their_distance_and_once_without():
    tokens = torch.arange(5 * (L + 1)).reshape(5, L + 1)[:, :-1].numpy()
    probe = needle_probe(tokens, 6, np.random.default_rng(1))
    by_passage = np.array(probe.requests, dtype=object).reshape(6, 1 + len(probe.points))
    for without, *at_distances in by_passage:
        passage = without.tokens[-8:]
        assert len(without.tokens) == L + 1 and len(set(without.tokens)) == L + 1
        assert passage[0] // (L + 1) != without.tokens[0] // (L + 1)
        for distance, one in zip(probe.points, at_distances, strict=True):
            assert one.first == without.first == L + 1 - 8 + 2
            begin = L + 1 - 8 - distance
            assert one.tokens[begin : begin + 8] == passage == one.tokens[-8:]
            assert [*one.tokens[:begin], *one.tokens[begin + 8 :]] == [
                *without.tokens[:begin],
                *without.tokens[begin + 8 :],
            ]


def test_others_are_compared_with_the_first_on_the_same_samples():
    models = {"one": Made(small(2)), "same": Made(small(2)), "other": Made(small(1))}
    found = findings(models, [held_out(4, L)])
    for measure, points in found["points"].items():
        for point in range(len(points)):
            first, same, other = (model[measure][point] for model in found["models"])
            assert first["above"] == same["above"] == same["above_error"] == 0 and same["mean"] == first["mean"]
            assert other["above"] == pytest.approx(other["mean"] - first["mean"], abs=1e-6)
    assert found["models"][2]["loss"][9]["above_error"] > 0 and found["models"][2]["attention"] == "MQA"
    assert findings(models, [held_out(4, L)]) == found != findings(models, [held_out(4, L)], seed=2)


def test_errors_are_those_of_a_mean_and_of_a_ratio():
    values = np.random.default_rng(0).normal(size=(9, 2))
    mean, error = long_range._mean_and_error(values, np.ones_like(values))
    np.testing.assert_allclose(mean, values.mean(0))
    np.testing.assert_allclose(error, values.std(0, ddof=1) / 3)
    draws = np.random.default_rng(1)
    sizes = draws.integers(1, 9, (4000, 50, 1)).astype(float)  # samples of several sizes, of which some are empty
    sizes[:, ::5] = 0
    sums = draws.normal(3 * sizes, np.sqrt(sizes))
    means, errors = zip(*(long_range._mean_and_error(*of) for of in zip(sums, sizes, strict=True)), strict=True)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)
    assert np.isnan(long_range._mean_and_error(values[:1], np.ones((1, 2)))[1]).all()


def test_rows_that_are_too_few_or_too_short_are_said_together():
    assert problems_of(np.zeros((1, 8), dtype=int)) == [
        "train.seq_len=8: too short to recall pairs in; at least 16 would work",
        "train.val_sequences=1: a passage of one held-out sequence is read in another; at least 2 would work",
    ]
    padded = held_out(2, L)
    padded.labels[1] = IGNORED
    with pytest.raises(BadInput, match=r"^train.val_sequences=1: "):
        findings({"one": Made(small(2))}, [padded])
    shortest = findings({"one": Made(small(2))}, [held_out(2, 16)])
    assert shortest["pairs"] == 2 and shortest["points"]["accuracy"] == [4, 12] and shortest["passage"] == 2
    assert position_probe([held_out(2, 16)]).points == (1, 2, 3, 4, 6, 8, 11)


def test_tables_and_pictures_are_means_over_seeds(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    bars = []
    errorbar = Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda axes, *of, **how: bars.append(of) or errorbar(axes, *of, **how))
    models = {"one": Made(small(2)), "other": Made(small(1))}
    seeds = [findings(models, [held_out(4, L, seed=seed)], seed) for seed in (1, 2)]
    expected = [(a + b) / 2 for a, b in zip(means(seeds[0], "gain", 1), means(seeds[1], "gain", 1), strict=True)]
    tables = long_range_tables(seeds)
    (columns, rows), names = list(tables.values())[3], [rows[1][0] for _, rows in tables.values()]
    assert columns == ["model", *map(str, seeds[0]["points"]["gain"])] and names == ["other"] * 4
    assert rows[1][1:] == pytest.approx(expected)
    paths = draw_long_range(seeds, tmp_path)
    assert [path.name for path in paths] == ["loss-by-position.png", "long-range.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    points, mean, (down, up) = bars[-1]
    assert len(bars) == 2 * 2 + 3 * 2 and points == seeds[0]["points"]["gain"] and list(mean) == pytest.approx(expected)
    low = [min(a, b) for a, b in zip(means(seeds[0], "gain", 1), means(seeds[1], "gain", 1), strict=True)]
    assert list(mean - down) == pytest.approx(low) and list(up) == pytest.approx(list(down))
    draw_long_range(seeds[:1], tmp_path)
    assert list(bars[-1][2][0]) == pytest.approx([point["error"] for point in seeds[0]["models"][1]["gain"]])
