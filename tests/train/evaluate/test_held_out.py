"""Losses of held-out sets: by source, in bits per byte, through an engine's micro-batches and through scores."""

import json
import math

import numpy as np
import pytest

from conf.compose import compose_overrides
from conf.eval_settings import problems as setting_problems
from conf.train_settings import DataConfig, NamedCorpus, Source
from model.loss import IGNORED
from model.problems import BadInput
from parallel.scoring import Score
from train.data.documents import batch_of
from train.data.prepare import prepare
from train.data.sources import PreparedSources, prepare_run
from train.data.token_bytes import token_bytes
from train.evaluate.held_out import Loss, requests_of, scored, sets_of_run, together
from train.evaluate.sets import extra_sets, prepare_sets
from train.evaluate.sets import problems as set_problems


@pytest.fixture(scope="module")
def prepared(corpus, overrides):
    """A mixture, and a set of one more folder."""
    sources = f"data.sources={{a: {{path: '{corpus}/a*.py', weight: 3}}, b: {{path: '{corpus}/b*.py'}}}}"
    sets = f"eval.sets={{c: {{path: '{corpus}/c*.py'}}}}"
    config = compose_overrides([*overrides, "data.path=null", sources, sets, "train.val_sequences=9"]).config
    config.data.document_mask = True
    data = prepare_run(config, progress=False)
    tokenizer, sizes = data.tokenizer_path, (config.model.vocab_size, config.train.seq_len)
    return config, data, prepare_sets(config.data, config.eval.sets, tokenizer, *sizes, progress=False)


def uniform(vocab_size):
    """Scores of a model to which all tokens are equally likely."""
    return lambda requests: [Score(-(len(r.tokens) - r.first) * math.log(vocab_size), False) for r in requests]


def test_a_mixture_is_measured_source_by_source(prepared):
    config, data, _ = prepared
    sets = sets_of_run(config, data)
    assert {one.name: one.number for one in sets} == {"a": 7, "b": 2}
    whole = data.held_out(config)
    taken = [sequences[index].tolist() for sequences, index in whole.locate(np.arange(9))]
    mine = [[*one.tokens[0].tolist()] for each in sets for one in each.batches(1)[0]]
    assert sorted(mine) == sorted(row[:-1] for row in taken)


def test_a_set_is_all_of_its_documents_in_the_runs_tokens(prepared, corpus):
    config, data, sets = prepared
    (one,) = extra_sets(config, sets)
    seq_len = config.train.seq_len
    whole = one.sequences.stream.read(0, one.sequences.num_tokens)
    cuts = np.flatnonzero(whole == data.eos_id)
    decode = data.tokenizer().decode
    texts = {decode(part[part != data.eos_id].tolist()) for part in np.split(whole, cuts)}
    assert texts - {""} == {path.read_text() for path in corpus.glob("c*.py")}
    assert one.number == min(9, (len(whole) - 1) // seq_len)


def test_bits_per_byte_are_those_of_the_text_whatever_the_tokenizer(corpus, tmp_path):
    """Two tokenizers, of 300 and 900 tokens, on the same text, and a model that takes all tokens for equally likely."""
    found = {}
    for vocab_size in (300, 900):
        cache, path = str(tmp_path / str(vocab_size)), str(corpus / "base64.py")
        data = DataConfig(source=Source.files, path=path, cache_dir=cache, val_fraction=0.0)
        tokens = prepare(data, vocab_size, 16, progress=False)
        config = compose_overrides(["model=tiny", "train.seq_len=16", "train.val_sequences=100000"]).config
        (one,) = extra_sets(config, PreparedSources({"text": tokens}))
        table = token_bytes(tokens.tokenizer(), tokens.eos_id)
        loss = scored(one, uniform(vocab_size), table, 16)
        text = tokens.tokenizer().decode(tokens.train(16).stream.read(1, loss.labels).tolist())
        assert loss.num_bytes == len(text.encode()) > 15_000 and loss.labels == one.number * 16
        assert loss.mean == pytest.approx(math.log(vocab_size))
        bits = loss.labels * math.log2(vocab_size) / len(text.encode())
        found[vocab_size] = loss.figures()
        assert found[vocab_size] == pytest.approx(
            {"loss": math.log(vocab_size), "perplexity": vocab_size, "bits_per_byte": bits}
        )
    # The larger vocabulary loses more on each token, and less on each byte.
    assert found[300]["loss"] < found[900]["loss"] and found[300]["bits_per_byte"] > found[900]["bits_per_byte"]


@pytest.mark.parametrize("document_mask", [True, False])
def test_requests_are_the_documents_of_a_micro_batch(document_mask):
    rows = np.array([[7, 8, 1, 4, 5, 1, 6], [1, 1, 2, 3, -1, -1, -1]])
    requests = list(requests_of(batch_of(rows, eos_id=1, document_mask=document_mask)))
    assert [one.first for one in requests] == [1] * len(requests)
    if document_mask:
        assert [one.tokens for one in requests] == [[7, 8, 1], [1, 4, 5, 1], [1, 6], [1, 1], [1, 2, 3]]
    else:
        assert [one.tokens for one in requests] == [rows[0].tolist(), [1, 1, 2, 3]]


def test_a_label_that_is_lost_is_in_no_request():
    """Documents that end in no end token: what begins behind one is not predicted from it."""
    starts = np.array([[True, False, False, True, False]])
    batch = batch_of(np.array([[4, 5, 6, 7, 8]]), eos_id=None, document_mask=True, starts=starts)
    assert batch.labels.tolist() == [[5, 6, IGNORED, 8]]
    assert [one.tokens for one in requests_of(batch)] == [[4, 5, 6], [7, 8]]


def test_scores_are_taken_in_parts_and_summed(prepared, monkeypatch):
    config, data, _ = prepared
    table = token_bytes(data.tokenizer(), data.eos_id)
    one = max(sets_of_run(config, data), key=lambda each: each.number)
    whole = scored(one, uniform(400), table, config.train.seq_len)
    monkeypatch.setattr("train.evaluate.held_out._REQUESTS", 1)
    monkeypatch.setattr("train.evaluate.held_out._ROWS", 2)
    assert scored(one, uniform(400), table, config.train.seq_len) == pytest.approx(whole) and whole.labels == 7 * 32
    assert together([whole, Loss(1.0, 2, 3)]) == Loss(whole.nats + 1.0, whole.labels + 2, whole.num_bytes + 3)
    assert math.isnan(Loss(0.0, 0, 0).mean) and Loss(2000.0, 1, 1).figures()["perplexity"] == math.inf


def test_what_is_wrong_with_sets_is_said_by_their_keys(prepared, corpus, tmp_path):
    config, data, _ = prepared
    sets = {"no": NamedCorpus(path=str(tmp_path / "no")), "hub": NamedCorpus(source=Source.hub)}
    assert [problem.partition("=")[0] for problem in set_problems(config.data, sets)] == [
        "eval.sets.no.path", "eval.sets.hub.name"
    ]  # fmt: skip
    (tmp_path / "few.txt").write_text("a")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"body": "no text"}))
    sets = {name.partition(".")[0]: NamedCorpus(path=str(tmp_path / name)) for name in ("few.txt", "bad.jsonl")}
    with pytest.raises(BadInput) as caught:
        prepare_sets(config.data, sets, data.tokenizer_path, 400, 32, progress=False)
    few, bad = caught.value.problems
    assert few == (
        "eval.sets.few: has only 2 tokens, and one sequence takes 33; a larger set, or a shorter train.seq_len, would "
        "work"
    )
    assert bad.startswith(f"eval.sets.bad.path={tmp_path}/bad.jsonl: no usable document")


def test_settings_that_cannot_be_are_refused():
    given = ["eval.tasks=[{context: q},7,{path: /x.jsonl, foo: 3},'a b.jsonl',{path: continuation, context: s}]",
             "eval.sets={a: {path: /p, name: x}, stdlib: {path: /p}}", "eval.every_steps=0", "eval.at=[0]",
             "eval.limit=0", "eval.shots=-1"]  # fmt: skip
    found = setting_problems(compose_overrides(given).config.eval, ["stdlib"])
    assert [problem.partition(": ")[0] for problem in found] == [
        *["eval.tasks={'context'", "eval.tasks=7", "eval.tasks=/x.jsonl", "eval.tasks=a b.jsonl"],
        *["eval.tasks=continuation", "eval.every_steps=0", "eval.limit=0", "eval.shots=-1", "eval.at=[0]"],
        *["eval.sets.a", "eval.sets.stdlib"],
    ]
    (idle,) = setting_problems(compose_overrides(["eval.every_steps=5"]).config.eval, [])
    assert idle.startswith("eval.every_steps=5: there is nothing to evaluate")
    assert compose_overrides(["eval.sets.a.path=/p"]).problems == [
        "eval.sets.a.path=/p: there is no set a yet; eval.sets={a: {path: /p}} would make it"
    ]


def test_evaluation_makes_no_other_run():
    one, other = (
        compose_overrides(["model=tiny", *given]).config.name
        for given in ([], ["eval.tasks=[continuation]", "eval.every_steps=3", "sample.every_steps=2"])
    )
    assert one == other
