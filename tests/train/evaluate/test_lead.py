"""Rank 0 leads: what it asks of the model, and what becomes of tasks that fail, on one process."""

import logging
from contextlib import contextmanager

import pytest

from conf.eval_settings import TaskSpec
from model.generate import Sampling
from parallel.scoring import Request, Score
from tests.shapes import small
from train.evaluate import asking
from train.evaluate.asking import OpenTasks
from train.evaluate.lead import led
from train.evaluate.tasks import Asked

CONFIG = small(2, vocab_size=300)


class Model:
    """Gives each request what it asks for as its score; fails where it is told to."""

    def __init__(self, fails=False):
        self.fails, self.asked = fails, []

    def score(self, requests):
        if self.fails:
            raise RuntimeError("out of memory")
        self.asked.append(requests)
        return [Score(-float(sum(one.tokens[one.first :])), True) for one in requests]

    @contextmanager
    def decoder(self, prompts, room):
        self.asked.append((prompts, room))
        yield None


def test_requests_arrive_as_they_are_asked():
    model, asked = Model(), [Request([1, 2, 3], 1), Request([4, 5], 1), Request([7, 8, 9, 10], 3)]
    assert led(model, CONFIG, None, lambda leader: leader.score(asked)) == [
        Score(-5, True),
        Score(-5, True),
        Score(-10, True),
    ]
    arrived = [[(list(one.tokens), one.first) for one in requests] for requests in model.asked]
    assert arrived == [[(list(one.tokens), one.first) for one in asked]]
    assert led(model, CONFIG, None, lambda leader: leader.score([])) == []


def test_what_cannot_be_asked_is_refused_before_any_rank_is_told():
    model = Model()
    for wrong in ([1], [1, 300], [1, -2], list(range(CONFIG.max_seq_len + 2))):
        with pytest.raises(ValueError, match="would work"):
            led(model, CONFIG, None, lambda leader, wrong=wrong: leader.score([Request([1, 2], 1), Request(wrong, 1)]))
    for prompts in ([[]], [[1] * CONFIG.max_seq_len]):
        with pytest.raises(ValueError, match="leave room for 1"):
            led(model, CONFIG, None, lambda leader, prompts=prompts: leader.complete(prompts, 1, [0], Sampling(0)))
    assert model.asked == [] and led(model, CONFIG, None, lambda leader: leader.complete([], 5, [0], Sampling(0))) == []


class Played:
    """A task that scores one request, or fails."""

    def __init__(self, name, fails):
        self.name, self.notes, self.fails = name, [f"{name} is noted"], fails

    def evaluate(self, scorer):
        if self.fails:
            raise KeyError(self.name)
        return {"accuracy": scorer.score([Request([1, 2], 1)])[0].log_likelihood}


@pytest.fixture
def opened(monkeypatch):
    """Tasks by the names a (sound), b (fails as it is asked) and c (fails as it is opened, the first time)."""
    tried, said = [], []

    def open_task(spec, asked, speech):
        tried.append(spec.name)
        if spec.name == "c" and tried.count("c") == 1:
            raise OSError("disk")
        return Played(spec.name, fails=spec.name == "b")

    monkeypatch.setattr(asking, "open_task", open_task)
    monkeypatch.setattr(asking, "named", lambda specs: specs)
    specs = [TaskSpec(name, name) for name in "abc"]
    tasks = OpenTasks(specs, Asked(), None, lambda text, level: said.append((text, level)), "it goes on")
    return tasks, tried, said


def test_a_task_that_fails_costs_no_other_and_is_tried_again(opened):
    tasks, tried, said = opened
    assert led(Model(), CONFIG, None, tasks.ask) == {"a": {"accuracy": -2.0}, "c": {"accuracy": -2.0}}
    assert led(Model(), CONFIG, None, tasks.ask).keys() == {"a", "c"}
    assert tasks.failed == {"b": 2, "c": 1} and tried == ["a", "b", "c", "c"]  # each is opened once
    warned = [text for text, level in said if level == logging.WARNING]
    assert warned == [
        *["a: a is noted", "b: b is noted", "task c has failed (OSError: disk); it goes on"],
        *["task b has failed (KeyError: 'b'); it goes on", "c: c is noted"],
        "task b has failed (KeyError: 'b'); it goes on",
    ]


def test_a_model_that_fails_is_no_failure_of_a_task(opened):
    """Nobody knows then where the other ranks are: it has to end the run, as a step that fails does."""
    tasks, _, _ = opened
    with pytest.raises(RuntimeError, match="out of memory"):
        led(Model(fails=True), CONFIG, None, tasks.ask)
    assert "a" not in tasks.failed
