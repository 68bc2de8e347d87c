"""Several runs in real, forked processes: trained once, side by side, stopped and gone on with; and what fails."""

import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from launch.trainings.forks import Forks
from launch.trainings.starts import LOGS, CommandStarter, starter
from launch.trainings.train_all import Training, last_record, problems_of, train_all, val_losses
from model.problems import BadInput
from tests.launch.trainings.session import of_the_session
from tests.train.checkpoint import runs
from train.checkpoint.folder import newest_first

SHORT = ["train.total_tokens=1024", "train.val_every=2", "train.val_sequences=4"]


class Kept:
    """Starts trainings as a study does, and keeps which began in which slot."""

    def __init__(self, starts=starter):
        self.began, self._starts = [], starts

    @contextmanager
    def __call__(self, ranks, at_once):
        with self._starts(ranks, at_once) as found:
            begin = found.start

            def start(prepared, slot):
                self.began.append((prepared.run_dir.name, slot))
                return begin(prepared, slot)

            found.start = start
            yield found


@pytest.fixture
def three(overrides, tmp_path):
    return [
        Training(f"seed-{seed}", tmp_path / f"it's {seed}", (*overrides, *SHORT, f"train.seed={seed}"))
        for seed in (1, 2, 3)
    ]


@pytest.mark.launch
def test_runs_are_trained_side_by_side_and_once(three, tmp_path):
    said, kept = [], Kept()
    assert problems_of(three) == []
    two_ranks = Training("pipeline", tmp_path / "pipeline", (*three[0].overrides, "parallel.pp=2"))
    all_four = [*three, two_ranks]
    assert train_all(all_four, at_once=2, say=said.append, start=kept) is None
    assert [name for name, _ in kept.began] == ["it's 1", "it's 2", "it's 3", "pipeline"]
    assert [slot for _, slot in kept.began[:2]] == [0, 1]
    losses = [val_losses(one.run_dir) for one in all_four]
    assert [list(found) for found in losses] == [[2, 4]] * 4
    assert losses[0] != losses[1] and losses[0][4] == pytest.approx(losses[3][4], abs=1e-5)
    assert last_record(three[0].run_dir)["step"] == 4
    assert len(said) == 4 and said[-1].startswith("4 of 4 trained") and f"{losses[3][4]:.4f}" in " ".join(said)
    assert train_all(all_four, at_once=2, say=said.append, start=kept) is None
    assert len(kept.began) == 4 and len(said) == 4


@pytest.mark.launch
def test_a_signal_has_all_save_and_the_same_call_goes_on(three, tmp_path):
    said, kept = [], Kept(of_the_session)
    long = [replace(one, overrides=(*one.overrides, "train.total_tokens=1e8")) for one in three]

    def stop():
        while not all(last_record(one.run_dir) for one in long[:2]):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    before = signal.getsignal(signal.SIGTERM)
    assert train_all(long, at_once=2, say=said.append, start=kept) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert said == ["stopped after 0 of 3 trainings; the same command goes on"]
    assert len(kept.began) == 2 and not long[2].run_dir.exists()
    for one in long[:2]:
        assert newest_first(one.run_dir / "checkpoints")
    # to an end that is near, the same two go on from there
    before_them = [last_record(one.run_dir)["step"] for one in long[:2]]
    near = [replace(one, overrides=(*one.overrides, f"train.max_steps={step + 1}"))
            for one, step in zip(long, before_them, strict=False)]  # fmt: skip
    assert train_all(near, at_once=2, say=said.append, start=kept) is None
    for one, step in zip(near, before_them, strict=True):
        assert [record["step"] for record in runs.metrics(one.run_dir)] == list(range(1, step + 2))


class Ended:
    """A training of a moment: what it prints, leaves and ends with; told to stop, it goes on for a few looks."""

    def __init__(self, prepared, looks, code, summary):
        self.code, self.told, self.looks, self.killed = code, [], -looks, False
        (prepared.run_dir / LOGS).mkdir(parents=True)
        (prepared.run_dir / LOGS / "rank0.log").write_text("no room left")
        if summary is not None:
            (prepared.run_dir / "summary.json").write_text(json.dumps(summary))

    def poll(self):
        self.looks += 1
        return self.code if self.looks > 0 else None

    def signal(self, number):
        self.told.append(number)
        return True

    def kill(self):
        self.killed = True


class Stage:
    """Starts `Ended` ones, as they are asked for by the name of the run folder."""

    def __init__(self, **ends):
        self.ends, self.started, self.slots = ends, {}, 0

    @contextmanager
    def __call__(self, ranks, at_once):
        self.slots = at_once
        yield self

    def start(self, prepared, slot):
        name = prepared.run_dir.name
        self.started[name] = Ended(prepared, 3 * len(self.started), *self.ends[name])
        return self.started[name]


COMPLETE, DIVERGED = {"complete": True, "diverged": False}, {"complete": False, "diverged": True, "reason": "NaN"}


@pytest.fixture
def played(overrides, tmp_path):
    return [Training(name, tmp_path / name, tuple(overrides), name == "b") for name in "abc"]


def test_one_that_fails_ends_the_others_and_is_said(played):
    said, stage = [], Stage(a=(-9, None), b=(0, None), c=(0, COMPLETE))
    assert train_all(played, at_once=2, say=said.append, start=stage) == 128 + 9
    assert list(stage.started) == ["a", "b"] and stage.started["b"].told == [signal.SIGTERM]
    assert said == [f"a: ended with -9 ({played[0].run_dir}); it said last:\nno room left"]


def test_an_end_without_an_error_is_none_before_the_run_is_complete(played):
    said = []
    assert train_all(played, at_once=1, say=said.append, start=Stage(a=(0, None))) == 1
    assert said[0].startswith("a: ended without an error, and is not complete")


def test_where_a_loss_may_diverge_it_is_a_result(played):
    said, stage = [], Stage(a=(0, COMPLETE), b=(3, DIVERGED), c=(0, COMPLETE))
    assert train_all(played, at_once=3, say=said.append, start=stage) is None
    assert [text.rpartition(",")[0] for text in said][1] == "2 of 3 trained: b, diverged"
    assert played[1].is_done and not replace(played[1], may_diverge=False).is_done
    assert train_all(played, at_once=3, say=said.append, start=stage) is None and len(said) == 3
    played[0] = replace(played[0], run_dir=played[0].run_dir.with_name("d"))
    stage.ends["d"] = (3, DIVERGED)
    assert train_all(played, at_once=3, say=said.append, start=stage) == 3


def test_one_that_cannot_start_lets_the_others_save_first(played, overrides):
    stage = Stage(a=(0, None))
    wrong = replace(played[1], overrides=(*overrides, "optimizer.lr=-1"))
    with pytest.raises(BadInput, match=r"optimizer\.lr"):
        train_all([played[0], wrong], at_once=2, say=print, start=stage)
    assert stage.started["a"].told == [signal.SIGTERM] and stage.started["a"].looks > 0


def test_all_problems_are_found_first(three):
    wrong = [Training(one.name, one.run_dir, (*one.overrides, "optimizer.lr=-1", f"train.micro_batch={n}"))
             for n, one in enumerate(three)]  # fmt: skip
    found = problems_of(wrong)
    assert len([text for text in found if "optimizer.lr" in text]) == 1
    assert any("micro_batch=0" in text for text in found)


class SignalledInStart(Stage):
    """Is told to stop, or to end at once, while a training is being started."""

    def __init__(self, *numbers, **ends):
        super().__init__(**ends)
        self.numbers = numbers

    def start(self, prepared, slot):
        started = super().start(prepared, slot)
        for number in self.numbers:
            os.kill(os.getpid(), number)
        return started


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_a_signal_while_the_first_is_started_ends_it(played, numbers):
    stage = SignalledInStart(*numbers, a=(-9, None))
    assert train_all(played, at_once=1, say=print, start=stage) == 128 + numbers[0]
    assert list(stage.started) == ["a"] and stage.started["a"].killed


def test_a_signal_while_a_second_is_started_stops_that_too(played):
    class Later(SignalledInStart):
        def start(self, prepared, slot):
            self.numbers = [signal.SIGTERM] if self.started else []
            return super().start(prepared, slot)

    said, stage = [], Later(a=(0, None), b=(0, None))
    assert train_all(played, at_once=2, say=said.append, start=stage) == 0
    assert [one.told for one in stage.started.values()] == [[signal.SIGTERM], [signal.SIGTERM]]
    assert said == ["stopped after 0 of 3 trainings; the same command goes on"]


def test_one_that_fails_as_it_is_stopped_has_failed(played):
    class Later(SignalledInStart):
        def start(self, prepared, slot):
            self.numbers = [signal.SIGTERM] if self.started else []
            return super().start(prepared, slot)

    said, stage = [], Later(a=(1, None), b=(0, None))
    assert train_all(played, at_once=2, say=said.append, start=stage) == 1
    assert said[0].startswith("a: ended with 1")


def test_a_signal_as_the_last_one_ends_begins_no_further_phase(played):
    class Last(SignalledInStart):
        def start(self, prepared, slot):
            started = super().start(prepared, slot)
            poll = started.poll

            def last():
                os.kill(os.getpid(), signal.SIGTERM)
                started.looks = 1
                return poll()

            started.poll = last
            return started

    said = []
    assert train_all(played[:1], at_once=1, say=said.append, start=Last(a=(0, COMPLETE))) == 0
    assert said[-1] == "stopped after 1 of 1 trainings; the same command goes on"


NO_IMPORTS = "from launch.trainings import fork_server; fork_server.PRELOADED = (); fork_server.main()"


def test_ranks_end_with_the_process_that_they_are_forked_from(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.trainings.forks._SERVER", NO_IMPORTS)
    (tmp_path / "waits.py").write_text("import time; time.sleep(600)")
    with Forks(environment={"PYTHONPATH": str(tmp_path)}) as forks:
        ranks = forks.start("waits", 2, [], tmp_path)
        assert ranks.poll() is None
        os.kill(forks.server, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while ranks.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert ranks.poll() == -signal.SIGKILL
        with pytest.raises(RuntimeError, match="no rank could be forked"):
            forks.start("waits", 1, [], tmp_path)


def test_a_slot_has_devices_of_its_own(monkeypatch):
    for visible, ranks, slots in (("0,1,2", 2, [["0", "1"], ["0", "1"]]), ("3,4,5,6", 2, [["3", "4"], ["5", "6"]])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        starts = CommandStarter(ranks, 2)
        assert [starts.devices(slot) for slot in range(2)] == slots
