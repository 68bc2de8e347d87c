"""Tasks in files and of held-out documents: what is asked, how it is judged, and what is refused."""

import gzip
import json
import math
from dataclasses import replace

import pytest

from conf.eval_settings import task_specs
from parallel.scoring import Score
from train.data.tokenizer import Encoder, eos_id, train_tokenizer
from train.evaluate.judged import Scored, of_choices, of_clozes
from train.evaluate.tasks import Asked, Speech, check, named, open_task

CHOICES = [
    {"context": "The sky is", "choices": ["green", "blue", "a long story"], "answer": 1},
    {"context": "Two and two are ", "choices": ["five", "four"], "answer": "B"},
    {"context": "Water is", "choices": ["dry", "wet"], "answer": "wet"},
]
CLOZES = [{"context": "to be or not to", "completion": "be"}, {"context": "one two", "completion": " three four"}]
TEXT = [row["context"] + " ".join(row.get("choices", [row.get("completion", "")])) for row in CHOICES + CLOZES]


@pytest.fixture(scope="module")
def speech():
    tokenizer = train_tokenizer(iter([*TEXT, "0123"] * 3), 300)
    encoder, end = Encoder(tokenizer), eos_id(tokenizer)
    return Speech(tokenizer, "tokenizer.json", lambda text: [end, *encoder.encode(text)], end, max_seq_len=64)


class Known:
    """Scores by a rule: every token that is scored costs a hundredth of its id, and even ids are the likeliest."""

    def __init__(self):
        self.requests = []

    def score(self, requests):
        self.requests += requests
        scored = [one.tokens[one.first :] for one in requests]
        return [Score(-sum(ids) / 100, all(token % 2 == 0 for token in ids)) for ids in scored]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def spec_of(given):
    (spec,), problems = task_specs([given if isinstance(given, dict) else str(given)])
    assert not problems
    return spec


def nats(speech, text):
    """What the rule makes of a text that stands alone behind others."""
    return sum(speech.encode(text)[1:]) / 100


def test_multiple_choice_is_asked_and_judged(speech, tmp_path):
    spec, model = spec_of(written(tmp_path / "sky.jsonl", CHOICES)), Known()
    task = open_task(spec, Asked(), speech)
    found = task.evaluate(model)
    assert task.name == "sky" and task.notes == [] and check([spec], Asked()) == []
    # A space goes between, and that at the end of a context goes with the ending.
    asked = [[" green", " blue", " a long story"], [" five", " four"], [" dry", " wet"]]
    decode = speech.tokenizer.decode
    assert [decode(one.tokens[one.first :]) for one in model.requests] == [text for row in asked for text in row]
    assert decode(model.requests[4].tokens) == "Two and two are four" and model.requests[4].tokens[0] == speech.end
    costs = [[nats(speech, text) for text in row] for row in asked]
    per_byte = [
        [cost / len(text.strip().encode()) for cost, text in zip(*row, strict=True)]
        for row in zip(costs, asked, strict=True)
    ]
    right = [1, 1, 1]
    assert found["accuracy"] == sum(row.index(min(row)) == at for row, at in zip(costs, right, strict=True)) / 3
    assert found["accuracy_norm"] == sum(row.index(min(row)) == at for row, at in zip(per_byte, right, strict=True)) / 3
    bits = [costs[n][at] / math.log(2) / len(asked[n][at].encode()) for n, at in enumerate(right)]
    assert found["bits_per_byte"] == pytest.approx(sum(bits) / 3)


def test_clozes_are_asked_and_judged(speech, tmp_path):
    model = Known()
    found = open_task(spec_of(written(tmp_path / "words.jsonl", CLOZES)), Asked(), speech).evaluate(model)
    ids = [one.tokens[one.first :] for one in model.requests]
    assert [speech.tokenizer.decode(one) for one in ids] == [" be", " three four"]
    costs = [sum(one) / 100 for one in ids]
    assert found == {
        "accuracy": sum(all(token % 2 == 0 for token in one) for one in ids) / 2,
        "perplexity": pytest.approx(math.exp(sum(costs) / 2)),
        "bits_per_byte": pytest.approx((costs[0] / 3 + costs[1] / 11) / 2 / math.log(2)),
    }


def test_accuracy_by_bytes_is_another():
    question = Scored((1, 10), 1, 10)
    found = of_choices([question], [Score(-2.0, False), Score(-3.0, False)])
    assert (found["accuracy"], found["accuracy_norm"]) == (0, 1)
    assert of_clozes([question], [Score(-1e4, False)])["perplexity"] == math.inf


def test_examples_stand_before_a_question_and_are_never_itself(speech, tmp_path):
    spec = spec_of(written(tmp_path / "sky.jsonl", CHOICES))
    asked, model, again = Asked(shots=2), Known(), Known()
    wide = replace(speech, max_seq_len=1000)
    open_task(spec, asked, wide).evaluate(model)
    open_task(spec, asked, wide).evaluate(again)
    assert [one.tokens for one in model.requests] == [one.tokens for one in again.requests]
    said = [speech.tokenizer.decode(one.tokens) for one in model.requests]
    rights = ["The sky is blue", "Two and two are four", "Water is wet"]
    for number, first in enumerate((0, 3, 5)):
        *examples, question = said[first].split("\n\n")
        assert sorted(examples) == sorted(rights[:number] + rights[number + 1 :])
        assert question.startswith(CHOICES[number]["context"])
    assert check([spec], Asked(shots=3)) == [
        f"eval.shots=3: {tmp_path}/sky.jsonl has 3 lines, of which one is the question; eval.shots=2 is the most that "
        "works"
    ]


def test_what_does_not_fit_the_context_is_cut_from_the_left_and_said(speech, tmp_path):
    long = [{"context": "0123" * 40, "choices": ["0", "1" * 90], "answer": 0}, CHOICES[0]]
    model = Known()
    task = open_task(spec_of(written(tmp_path / "long.jsonl", long)), Asked(limit=2), speech)
    task.evaluate(model)
    assert task.notes == ["1 of 2 questions are cut from the left to the model's context of 64 tokens, 1 of them within an ending"]  # fmt: skip  # noqa: E501
    whole = [speech.encode(long[0]["context"] + f" {ending}") for ending in long[0]["choices"]]
    assert [(one.tokens, one.first) for one in model.requests[:2]] == [(whole[0][-65:], 63), (whole[1][-65:], 1)]


def test_files_of_others_name_their_fields_and_are_compressed_or_in_folders(speech, tmp_path):
    (tmp_path / "arc").mkdir()
    rows = [{"question": {"stem": "a"}, "choices": {"text": ["b", "c"], "label": ["A", "B"]}, "answerKey": key}
            for key in ("A", "B", "1")]  # fmt: skip
    packed = tmp_path / "arc" / "easy.jsonl.gz"
    packed.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    written(tmp_path / "arc" / "hard.jsonl", rows)
    fields = {"context": "question.stem", "choices": "choices.text", "answer": "answerKey"}
    specs = named([spec_of({"path": str(tmp_path / "arc"), "name": "ours", **fields})])
    assert [spec.name for spec in specs] == ["ours/easy", "ours/hard"]
    assert check(specs, Asked()) == []
    assert [one.answer for one in open_task(specs[0], Asked(), speech)._questions] == [0, 1, 1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "is no JSON object"),
        ({"context": "a", "choices": ["b", "c"], "answer": 2}, "answer is 2, which means none of its 2 choices"),
        ({"context": "a", "choices": ["b", "c"], "answer": "Z"}, "answer is 'Z'"),
        ({"context": "a", "choices": ["b", "c"], "answer": True}, "answer is True"),
        ({"context": "a", "choices": ["b"], "answer": 0}, "choices is no list of two texts"),
        ({"choices": ["b", "c"], "answer": 0}, "context is no text (the line has choices, answer)"),
    ],
)
def test_lines_that_are_no_questions_are_refused_by_their_place(line, said, tmp_path):
    path = written(tmp_path / "q.jsonl", CHOICES)
    with path.open("a") as file:
        file.write("\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    (problem,) = check([spec_of(path)], Asked())
    assert problem.startswith(f"eval.tasks={path}: line 5: {said}") and problem.endswith("would work")


def test_a_cloze_without_a_completion_is_none(tmp_path):
    (problem,) = check([spec_of(written(tmp_path / "q.jsonl", [{"context": "a", "completion": ""}]))], Asked())
    assert "completion is empty" in problem
    (problem,) = check([spec_of(written(tmp_path / "q.jsonl", [{"context": "a"}] * 9))], Asked())[3:]
    assert "6 more lines are no questions" in problem


def test_tasks_that_are_not_there_are_named_with_what_would_work(tmp_path):
    written(tmp_path / "arc_easy.jsonl", CHOICES)
    (tmp_path / "empty").mkdir()
    given = [tmp_path / "arc-easy.jsonl", "continuatoin", tmp_path / "empty", tmp_path / "arc_easy.jsonl"]
    works = "a file or a folder of JSON lines, continuation or lm_eval/NAME would work"
    again = spec_of({"path": str(given[3]), "answer": "key"})
    assert [problem.split(": ", 1)[1] for problem in check([*map(spec_of, given), again], Asked())] == [
        f"no such task; did you mean {tmp_path}/arc_easy.jsonl? {works}",
        f"no such task; did you mean continuation? {works}",
        "the folder holds no file of JSON lines; one with .jsonl files would work",
        f"bears the name arc_easy, as {given[3]} does; {{name: another, path: {given[3]}}} would work",
    ]
