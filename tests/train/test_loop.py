"""The loop, over an engine, a saver and a tracker that a test plays."""

import gc
import inspect
import math
import os
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from conf.ranges import ranges_of
from parallel.engine import StepResult
from parallel.heartbeat import Phase
from parallel.layout import Layout
from tests.shapes import preset
from train import loop, report, run
from train.data.mixed_order import MixedOrder
from train.evaluate.evaluator import Evaluator
from train.health import Health
from train.length import Consumed, length_of
from train.loop import Progress, garbage_collected_by_hand, take_steps
from train.predicted import Expected
from train.report import RunConstants
from train.run import be_deterministic, compute_dtype
from train.spikes import SpikeWindow

STEPS = 4


class Played(SimpleNamespace):
    """A run of rank 0 that writes down what is done with it."""

    def __init__(self, *overrides, stop_after=None, busy=False, nonfinite=()):
        config = preset("tiny", "train.val_every=0", f"train.max_steps={STEPS}", *overrides)
        super().__init__(config=config, length=length_of(config), done=[], records=[], nonfinite=nonfinite)
        self.layout, self.rank, self.device, self.run_dir = Layout(dp=1, pp=1), 0, torch.device("cpu"), None
        self.signals = SimpleNamespace(asked=None)
        self.accumulated = []
        self.stop_after, self.steps_before, self.group, self.batches = stop_after, 0, None, iter(())
        self.constants, self.weights_are_finite = RunConstants(config.model, None, {}), True
        self.expected = Expected.nothing(config, self.layout)
        self.begun = Consumed()
        self.order = MixedOrder.of(config, self.length, self.begun)
        self.window = SpikeWindow(config.train.spike_sigmas)
        self.stragglers = SimpleNamespace(measured=lambda spans, kind: [])
        self.passed_steps = frozenset(chain(*ranges_of(config.train.skip_steps)))
        self.prepared = SimpleNamespace(data=SimpleNamespace(fingerprints={"corpus": "0f"}))
        self.engine = SimpleNamespace(step=self.step)
        self.tracker = SimpleNamespace(step=self.track, saved=lambda outcome: None, sync=lambda: None)
        self.evaluator = SimpleNamespace(after=self.evaluated, validation_loss=lambda: 3.0)
        self.tracker.passed_over = lambda record: self.done.append(("passed over", record["step"]))
        self.saver = SimpleNamespace(
            busy=busy, due=lambda step: step % 2 == 1, save=self.save, wait=lambda: None, news=lambda: None
        )

    rate, kind = run.Run.rate, run.Run.kind
    slow_ranks, ends_of_batch = run.Run.slow_ranks, run.Run.ends_of_batch
    micro_batches, source_tokens, history = run.Run.micro_batches, run.Run.source_tokens, run.Run.history

    def step(self, batches, rate, micro_batches, limits):
        self.accumulated.append(micro_batches)
        number = sum(what == "step" for what, _ in self.done) + 1
        self.done.append(("step", rate))
        if number == self.stop_after:
            self.signals.asked = 15
        lost = number in self.nonfinite
        return StepResult(math.nan if lost else 2.0, math.inf if lost else 1.0, lost, (0.0, 0.0), [], 0.0)

    def evaluated(self, step, asks):
        assert asks is (step != self.stop_after or step == self.length.steps)  # told to stop, it saves first
        if not Evaluator.validates_after(SimpleNamespace(_config=self.config, _steps=self.length.steps), step):
            return {}
        self.done.append(("evaluate", None))
        return {"val_loss": 3.0}

    def skipped(self, step, result, limits):
        return result.skipped

    def track(self, record, skipped):
        self.records.append((record, skipped))
        self.done.append(("record", record["step"]))

    def save(self, step, tokens, history):
        assert tokens == self.length.tokens_after(step) == Consumed.from_json(history["now"]).tokens
        self.done.append(("save", step))

    def say(self, text, level=20):
        self.done.append(("say", text))


@pytest.fixture(autouse=True)
def agreed(monkeypatch):
    """How often ranks told each other something."""
    calls = []
    monkeypatch.setattr(report, "max_over_ranks", lambda values, group: calls.append(values) or values)
    return calls


def done(played):
    progress = Progress(played.steps_before)
    health = Health(0, played.config.train.max_skipped, lambda: played.weights_are_finite, lambda: None)
    take_steps(played, progress, health)
    return progress, [(what, step) if what in ("record", "save") else what for what, step in played.done]


def test_a_step_is_taken_agreed_on_evaluated_recorded_and_saved(agreed):
    progress, order = done(Played("train.val_at=[2]"))
    assert order == [
        *["step", ("record", 1), ("save", 1)],
        *["step", "evaluate", ("record", 2)],
        *["step", ("record", 3), ("save", 3)],
        *["step", "evaluate", ("record", 4), ("save", 4)],  # the last is evaluated and saved in any case
    ]
    assert (progress.step, progress.stopped, progress.timed_steps) == (STEPS, False, STEPS - 1)
    assert len(agreed) == STEPS  # one small collective a step


def test_each_record_has_what_a_plan_predicts_and_steps_but_the_first_are_compared(agreed):
    played = Played("cluster=h100")
    played.expected = Expected.of(played.config, played.layout, False, played.device)
    compared = []
    keep = played.expected.compared
    played.expected.compared = lambda record, size, counts: compared.append(counts) or keep(record, size, counts)
    done(played)
    predicted = {record["predicted_seconds"] for record, _ in played.records}
    assert len(predicted) == 1 and min(predicted) > 0
    assert compared == [False, *[True] * (STEPS - 1)]
    assert "on H100 SXM (data sheet)" in played.expected.said()[0]


def test_the_rate_of_each_step_is_the_schedules(agreed):
    played = Played("schedule.warmup_steps=4", "optimizer.lr=0.8")
    done(played)
    assert [rate for what, rate in played.done if what == "step"] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_batch_and_sources_of_each_step_are_the_settings(agreed):
    """Two stages and two batches, neither of which begins with the other."""
    mixture = "data.sources={a: {path: /a, weight: 1}, b: {path: /b, weight: 3}}"
    stages = "data.stages=[{until: 1000}, {until: 1e9, weights: {a: 1}, seq_len: 64}]"
    played = Played(mixture, stages, "train.global_batch='0:4 1.2e3:8'", "train.seq_len=128", "train.micro_batch=2")
    done(played)
    assert played.accumulated == [2, 2, 2, 4]
    assert [(record["tokens"], record["source_tokens"]) for record, _ in played.records] == [
        (512, {"a": 128, "b": 384}),
        (1024, {"a": 256, "b": 768}),
        (1280, {"a": 512, "b": 768}),
        (1792, {"a": 1024, "b": 768}),
    ]


def test_told_to_stop_it_saves_the_step_under_way():
    progress, order = done(Played(stop_after=2))
    assert order[-2:] == [("record", 2), ("save", 2)] and progress.stopped and progress.step == 2
    progress, order = done(Played(stop_after=STEPS))  # all steps are taken: there is nothing to go on with
    assert not progress.stopped and progress.step == STEPS


def test_a_save_that_is_due_while_one_is_written_is_told_of_and_the_last_one_waits():
    _, order = done(Played(busy=True))
    played = Played(busy=True)
    done(played)
    said = [text for what, text in played.done if what == "say"]
    assert [text.partition(":")[0] for text in said] == ["step 1 is not saved", "step 3 is not saved"]
    assert [step for what, step in played.done if what == "save"] == [STEPS]
    _, order = done(Played("checkpoint.enabled=false"))
    assert not any(what == "save" for what, *_ in (one for one in order if isinstance(one, tuple)))


def test_a_skipped_step_is_recorded_as_such():
    played = Played(nonfinite=(2,))
    done(played)
    assert [skipped for _, skipped in played.records] == [False, True, False, False]
    assert math.isnan(played.records[1][0]["loss"])


def test_a_step_that_is_passed_over_is_not_taken_and_puts_its_save_off():
    played = Played("train.skip_steps=[2,4-5]", "train.max_steps=8", "checkpoint.every_steps=4", "train.val_at=[4]")
    played.saver.due = lambda step: step % 4 == 0
    _, order = done(played)
    acts = [one for one in order if one != "say"]
    assert acts == [
        *["step", ("record", 1), "passed over", "step", ("record", 3), "passed over", "passed over"],
        *["step", ("record", 6), ("save", 6), "step", ("record", 7), "step", "evaluate", ("record", 8), ("save", 8)],
    ]
    rates = [rate for what, rate in played.done if what == "step"]
    assert rates == [played.rate(step) for step in (1, 3, 6, 7, 8)]
    (said, *_) = [text for what, text in played.done if what == "say"]
    assert said == "step 2 is passed over (train.skip_steps), and with it samples 8 to 15"


def test_whoever_watches_the_rank_hears_of_a_timeline_before_that_is_drawn(monkeypatch):
    played, at = Played(), []
    monkeypatch.setattr(loop.heart, "at", at.append)
    monkeypatch.setattr(loop.timeline, "gather", lambda *told: [[]])
    monkeypatch.setattr(loop.timeline, "write", lambda measured, run_dir: "a picture")
    played.tracker.picture = lambda name, picture: at.append(picture)
    loop._keep_timeline(played, 2, StepResult(2.0, 1.0, False, (0.0, 0.0), [], 0.0))
    assert at == [Phase.KEEP, "a picture"]


def test_all_ranks_collect_garbage_at_the_same_steps(monkeypatch):
    played, collected = Played("train.max_steps=120"), []
    monkeypatch.setattr(loop.gc, "collect", lambda: collected.append(len(played.records)))
    done(played)
    assert collected == [50, 100]


def test_the_collector_runs_by_hand_alone_until_the_loop_is_left():
    assert gc.isenabled()
    before = gc.get_freeze_count()
    with pytest.raises(KeyError), garbage_collected_by_hand():
        assert not gc.isenabled() and gc.get_freeze_count() > before
        raise KeyError
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_the_loop_can_be_read_on_a_page():
    assert len(inspect.getsource(take_steps).splitlines()) <= 60


def test_deterministic_algorithms_are_chosen_before_a_device_is_used(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", "")
    be_deterministic()
    assert asked == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.utils.deterministic.fill_uninitialized_memory is False


@pytest.mark.parametrize(("asked", "called"), [("true", ["deterministic", "started"]), ("false", ["started"])])
def test_a_run_asks_for_them_first(asked, called, monkeypatch):
    class Started(Exception):
        pass

    def start(rendezvous):
        order.append("started")
        raise Started

    import parallel.deepspeed_engine

    order = []
    monkeypatch.setattr(run, "be_deterministic", lambda: order.append("deterministic"))
    monkeypatch.setattr(parallel.deepspeed_engine, "start_process_group", start)
    prepared = SimpleNamespace(config=preset("tiny", f"train.deterministic={asked}"), layout=None)
    with pytest.raises(Started):
        run.open_run(prepared, None, None)
    assert order == called


@pytest.mark.parametrize(
    ("asked", "device", "dtype"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("bf16", "cpu", torch.bfloat16),
        ("fp32", "cuda", torch.float32),
    ],
)
def test_stages_compute_in_what_was_asked_for_or_what_the_device_is_made_for(asked, device, dtype):
    assert compute_dtype(preset("tiny", f"train.precision={asked}"), torch.device(device)) is dtype
