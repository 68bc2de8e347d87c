"""What a run takes of each source: said before it starts, and refused where that is more than the settings allow."""

from types import SimpleNamespace

import pytest

from model.problems import BadInput
from tests.shapes import preset
from train.data import sources
from train.data.sources import PreparedSources, prepare_run, repeated, shares, table, too_often
from train.length import Consumed, Steps, length_of


def corpus(tokens, fingerprint="0f"):
    return SimpleNamespace(
        num_train_tokens=tokens,
        num_val_tokens=0,
        fingerprint=fingerprint,
        train=lambda length: range((tokens - 1) // length),
    )


DATA = PreparedSources({"web": corpus(256_001, "a"), "books": corpus(25_601, "b"), "unused": corpus(1000, "c")})


def mixture(web="", books="", *overrides):
    of = f"{{web: {{path: /web{web}}}, books: {{path: /books{books}}}, unused: {{path: /u, weight: 0}}}}"
    return preset("tiny", f"data.sources={of}", *overrides)


def test_tokens_and_epochs_of_each_source_add_up_to_the_run():
    config = mixture(", weight: 3", ", weight: 1", "train.total_tokens=409600")  # 200 steps of 8 x 256
    found = {share.name: share for share in shares(config, DATA)}
    assert [(share.tokens, share.epochs) for share in found.values()] == [(307_200, 1.2), (102_400, 4.0), (0, 0)]
    assert "307,200 tokens, 75.00%; 1.2 epochs of 256,001 (repeated)" in table([*found.values()])
    assert "0 tokens,  0.00%; 0 epochs of 1,000\n" in table([*found.values()]) + "\n"
    first, second = repeated(config, DATA, [*found.values()], length_of(config))
    assert first.startswith(
        "train.total_tokens=409600: 1.2 epochs of source web, of which the run takes 307,200 tokens"
    )
    assert second.startswith("train.total_tokens=409600: 4.0 epochs of source books")


def test_a_trial_takes_what_its_steps_take_and_stages_add_up():
    stages = "data.stages=[{until: 204800}, {until: 1e13, seq_len: 128, weights: {books: 1}}]"
    config = mixture(", weight: 3", ", weight: 1", "train.total_tokens=409600", stages, "train.max_steps=150")
    web, books, _ = shares(config, DATA)
    assert (web.tokens, books.tokens) == (153_600, 51_200 + 50 * 8 * 128)
    # Half of them in sequences of 256 tokens, the others in such of 128.
    assert books.epochs == pytest.approx(200 / 100 + 400 / 200)


def test_what_a_run_goes_on_from_counts():
    config = mixture(", weight: 3", ", weight: 1", "train.total_tokens=409600")
    begun = Consumed((Steps(100, 8, 256),), {256: {"books": 800}}, 0, {"books": 204_800})
    web, books, _ = shares(config, DATA, begun)
    assert (web.tokens, books.tokens, books.epochs) == (153_600, 256_000, 10)


@pytest.mark.parametrize("limit", [4, 3.99, 2, 0.5])
def test_more_epochs_than_a_source_may_have_are_refused_with_what_would_work(limit):
    config = mixture(", weight: 3", f", weight: 1, max_epochs: {limit}", "train.total_tokens=409600")
    found = too_often(config, shares(config, DATA))
    if limit == 4:
        assert found == []
        return
    (problem,) = found
    assert problem.startswith(f"data.sources.books.max_epochs={limit:g}: the run takes 102,400 tokens of books")
    assert "4 epochs of its 25,601" in problem and "data.sources.books.max_epochs=4" in problem
    weight = float(problem.split("data.sources.books.weight=")[1].split()[0])
    config.data.sources["books"].weight = weight
    assert too_often(config, shares(config, DATA)) == []
    share = limit / 4 / 4
    assert 0.9 * share < weight / (3 + weight) <= share


def test_no_weight_is_proposed_where_none_would_do():
    alone = mixture(", weight: 0", ", weight: 1, max_epochs: 2", "train.total_tokens=409600")
    (problem,) = too_often(alone, shares(alone, DATA))
    assert "weight=" not in problem and "data.sources.books.max_epochs=16 or" not in problem
    assert "data.sources.books.max_epochs=16, or a shorter run, would work" in problem


def test_the_only_corpus_is_said_to_be_repeated_as_ever():
    config = preset("tiny", "train.total_tokens=409600")
    data = PreparedSources({"stdlib": corpus(256_001)})
    (line,) = repeated(config, data, shares(config, data), length_of(config))
    assert line.startswith("train.total_tokens=409600: 1.6 epochs, since 200 steps of train.global_batch=8 take 1,600 ")
    assert data.fingerprint == "0f" and DATA.fingerprint not in ("a", "b", "c")


def test_shares_that_had_to_be_rounded_are_said():
    config = mixture(", weight: 0.333333333", ", weight: 1")
    assert any(
        line.startswith("data.sources: shares are rounded")
        for line in repeated(config, DATA, shares(config, DATA), length_of(config))
    )


@pytest.mark.parametrize(
    ("prepared", "said"),
    [
        (
            {"web": corpus(9999, "a"), "books": corpus(9999, "a")},
            "data.sources.books: the same documents as data.sources.web",
        ),
        ({"web": corpus(200, "a"), "books": corpus(9999, "b")}, "data.stages[0].seq_len=200: source web has only 200 "),
    ],
)
def test_sources_that_are_one_and_sources_too_short_for_a_stage_are_refused(prepared, said, monkeypatch):
    monkeypatch.setattr(sources, "prepare_sources", lambda of, *args, **more: prepared)
    stages = "data.stages=[{until: 1e13, seq_len: 200}]"
    config = preset("tiny", "data.sources={web: {path: /w}, books: {path: /b}}", stages, "train.seq_len=100")
    with pytest.raises(BadInput) as caught:
        prepare_run(config)
    (problem,) = caught.value.problems
    assert problem.startswith(said)
