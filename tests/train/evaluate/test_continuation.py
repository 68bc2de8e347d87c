"""The task of a run's held-out documents: its questions, against the files that those are of."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from conf.compose import compose_overrides
from model.problems import BadInput
from parallel.scoring import Score
from train.data.sources import prepare_run
from train.evaluate.continuation import CHOICES, Continuation, problems
from train.evaluate.tasks import Asked, Speech


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Two sources of documents that are long enough, and some that are not, or go on as others do."""
    root, texts = tmp_path_factory.mktemp("documents"), []
    for name in "ab":
        numbers = [[str((number * 7919 + at) % 997) for at in range(99)] for number in range(9)]
        lines = [f"{name}{number} {' '.join(of)}" for number, of in enumerate(numbers)]
        lines += ["short"] * 3
        texts += lines
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    sources = f"data.sources={{a: {{path: '{root}/a.jsonl'}}, b: {{path: '{root}/b.jsonl'}}}}"
    sizes = ["model.vocab_size=300", "model.max_seq_len=64", "train.seq_len=32", "data.val_fraction=0.6"]
    config = compose_overrides(["model=tiny", sources, *sizes, f"data.cache_dir={root}/cache"]).config
    data = prepare_run(config, progress=False)
    speech = Speech.of_run(data.tokenizer(), data.tokenizer_path, data.eos_id, 64, data)
    return config, data, speech, texts


class Asking:
    """Keeps what it is asked, and finds a text of the corpus likelier than any other."""

    def __init__(self, speech, texts):
        self.requests, self._decode, self._texts = [], speech.tokenizer.decode, texts

    def score(self, requests):
        self.requests = requests
        said = [self._decode(request.tokens) for request in requests]
        return [Score(-float(not any(one in text for text in self._texts)), False) for one in said]


def test_the_right_ending_is_that_of_the_document(told):
    _, _, speech, texts = told
    model = Asking(speech, texts)
    task = Continuation(Asked(), speech)
    found = task.evaluate(model)
    assert found["accuracy"] == found["accuracy_norm"] == 1.0  # three of four endings make no text of the corpus
    decoded = [speech.tokenizer.decode(one.tokens) for one in model.requests]
    of = [{text[0] for text in texts if one in text} for one in decoded]
    assert {source for found in of for source in found} == {"a", "b"}  # and none of a short document
    questions = [range(at, at + CHOICES) for at in range(0, len(decoded), CHOICES)]
    right = [[number for number in four if of[number]] for four in questions]
    assert all(len(one) == 1 for one in right) and len({one[0] % CHOICES for one in right}) > 1
    documents = {texts.index(next(text for text in texts if decoded[one] in text)) for (one,) in right}
    assert len(questions) > len(documents) > 6  # several passages of each
    for four in questions:
        assert len({tuple(model.requests[one].tokens[: model.requests[one].first]) for one in four}) == 1
        first = model.requests[four[0]]
        begins = first.tokens[0] == speech.end
        assert (first.first, len(first.tokens)) == (32 + begins, 48 + begins)
        assert begins == any(text.startswith(decoded[one]) for one in four for text in texts)


def test_questions_are_the_same_every_time_and_others_with_another_seed(told):
    _, _, speech, _ = told

    def asked(**how):
        return [one.tokens for one in Continuation(Asked(**how), speech)._requests]

    assert asked() == asked() != asked(seed=2)
    assert len(asked(limit=2)) == 2 * CHOICES
    assert Continuation(Asked(limit=2, shots=1), speech).notes == ["it has no examples, whatever shots are asked for"]


def test_too_few_or_too_short_documents_are_said_before_a_run(told):
    config, data, speech, _ = told
    assert problems(data.by_name, config) == []
    short = SimpleNamespace(val=data.by_name["a"].val, ends=lambda split: iter([np.array([20, 40, 60, 110])]))
    (said,) = problems({"a": short}, config)
    assert said.startswith("continuation: 1 held-out documents have the 48 tokens that it takes, and it needs 4")
    with pytest.raises(BadInput, match="a run folder would work"):
        Continuation(Asked(), replace(speech, data=None))
