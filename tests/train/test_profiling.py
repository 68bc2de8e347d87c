"""The trace of a step, read back, and what becomes of a run that cannot keep it."""

import gzip
import json
import logging
import os
import pickle
import pkgutil
import resource

import pytest
import torch

from parallel.heartbeat import Phase
from parallel.pipeline import _span
from parallel.schedules import Action, Pass
from train import profiling
from train.profiling import messages_aside, profiled

CPU = torch.device("cpu")
NAME = "step-00000007-rank-3"
MIB = 2**20


class Said(list):
    def __call__(self, text, level):
        self.append((text, level))


def keep(run_dir, device=CPU, products=1):
    """Some products and an allocation of a MiB, with names; what was said."""
    said = Said()
    with profiled(run_dir, 7, 3, device, said):
        one = torch.ones(8, 16, device=device)
        with _span(Action(Pass.F, 2, 5)):
            for _ in range(products):
                torch.mm(one, one.T)
        with torch.profiler.record_function("large"):
            large = torch.empty(MIB, dtype=torch.uint8, device=device)
        del large
    return said


def read(run_dir):
    with gzip.open(run_dir / "profiles" / f"{NAME}.json.gz", "rt") as file:
        return json.load(file)["traceEvents"]


def named(events, name):
    return [event for event in events if event.get("name") == name]


def test_a_trace_has_operators_with_shapes_and_passes_with_names(tmp_path):
    said = keep(tmp_path)
    assert said == [(f"profile of step 7 on rank 3: {tmp_path}/profiles/{NAME}.json.gz", logging.INFO)]
    assert [path.name for path in (tmp_path / "profiles").iterdir()] == [f"{NAME}.json.gz"]
    events = read(tmp_path)
    (span,), (product,) = named(events, "F stage 2 micro-batch 5"), named(events, "aten::mm")
    assert product["args"]["Input Dims"] == [[8, 16], [16, 8]]
    assert span["ts"] <= product["ts"] and product["ts"] + product["dur"] <= span["ts"] + span["dur"]


def test_a_trace_has_the_bytes_that_are_held_over_time(tmp_path):
    keep(tmp_path)
    events = read(tmp_path)
    (span,) = named(events, "large")
    memory = sorted(named(events, "[memory]"), key=lambda event: event["ts"])
    (taken,) = [event["args"] for event in memory if event["args"]["Bytes"] == MIB]
    (freed,) = [event["args"] for event in memory if event["args"]["Bytes"] == -MIB]
    assert next(event for event in memory if span["ts"] <= event["ts"] <= span["ts"] + span["dur"])["args"] == taken
    assert taken["Total Allocated"] == freed["Total Allocated"] + MIB >= MIB + 8 * 16 * 4
    assert taken["Addr"] == freed["Addr"] and taken["Device Type"] == 0


def test_messages_leave_the_track_of_the_passes_they_overlap():
    there = {"pid": 1, "tid": 2, "cat": "user_annotation"}
    events = [
        {"ph": "X", "name": "gloo:recv", "ts": 1.0, "dur": 5.0, "args": {"Seq": 1}, **there},
        {"ph": "X", "name": "F stage 0 micro-batch 0", "ts": 2.0, "dur": 9.0, **there},
    ]
    begun, ended, untouched = messages_aside(events)
    assert begun == {"ph": "b", "name": "gloo:recv", "ts": 1.0, "id": 0, "args": {"Seq": 1}, **there}
    assert ended == {"ph": "e", "name": "gloo:recv", "ts": 6.0, "id": 0, **there}
    assert untouched == events[1]


def test_without_a_profiler_passes_are_not_recorded(monkeypatch):
    monkeypatch.delattr("torch.autograd.profiler.record_function")
    with _span(Action(Pass.F, 0, 0)):
        pass


def test_a_folder_that_cannot_be_written_is_said_and_ends_nothing(tmp_path):
    (tmp_path / "profiles").write_text("in the way")
    ((text, level),) = keep(tmp_path)
    assert level == logging.WARNING and "\n" not in text
    assert text.startswith("the profile of step 7 on rank 3 could not be kept (") and "profiles" in text


@pytest.mark.parametrize("where", ["torch.profiler.profile.export_chrome_trace", "json.dumps"])
def test_a_full_disk_is_said_and_leaves_no_part_of_a_trace(tmp_path, monkeypatch, where):
    """Torch raises nothing where it cannot write the trace; packing it, what comes then, does. A limit is the disk."""
    owner, _, name = where.rpartition(".")
    do, (_, most) = getattr(pkgutil.resolve_name(owner), name), resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_a_full_disk(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))
        return do(*arguments)

    monkeypatch.setattr(where, on_a_full_disk)
    try:
        ((text, level),) = keep(tmp_path, products=300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert level == logging.WARNING and "could not be kept (" in text
    assert ("torch's profiler wrote no whole trace" in text) == (name == "export_chrome_trace")
    assert list((tmp_path / "profiles").iterdir()) == []


def test_a_trace_that_was_cut_short_is_not_kept(tmp_path, monkeypatch):
    """A disk that is full when torch writes its last kilobytes: it does not notice."""
    export = torch.profiler.profile.export_chrome_trace

    def cut_short(trace, path):
        export(trace, path)
        os.truncate(path, os.path.getsize(path) - 100)

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", cut_short)
    ((text, level),) = keep(tmp_path)
    assert level == logging.WARNING and "torch's profiler wrote no whole trace" in text
    assert list((tmp_path / "profiles").iterdir()) == []


def test_whoever_watches_the_rank_hears_of_the_trace_before_that_is_written(tmp_path, monkeypatch):
    at = []
    monkeypatch.setattr(profiling.heart, "at", at.append)
    monkeypatch.setattr(profiling, "write", lambda path, trace, on_gpu: at.append("written"))
    keep(tmp_path)
    assert at == [Phase.KEEP, "written"]


def test_what_is_raised_meanwhile_passes_and_leaves_no_file(tmp_path):
    said = Said()
    with pytest.raises(ValueError, match="mine"), profiled(tmp_path, 7, 3, CPU, said):
        raise ValueError("mine")
    assert said == [] and list(tmp_path.iterdir()) == []
    assert len(keep(tmp_path)) == 1 and read(tmp_path)  # the next step can be traced all the same


@pytest.mark.gpu
def test_a_gpu_s_memory_is_kept_beside_it(tmp_path):
    keep(tmp_path, torch.device("cuda"))
    names = [f"{NAME}.json.gz", f"{NAME}.memory.pickle"]
    assert sorted(path.name for path in (tmp_path / "profiles").iterdir()) == names
    snapshot = pickle.loads((tmp_path / "profiles" / names[1]).read_bytes())
    taken = [event for trace in snapshot["device_traces"] for event in trace if event["action"] == "alloc"]
    assert any(event["size"] == MIB for event in taken)
    assert [event for event in read(tmp_path) if event.get("cat") == "kernel"]

    def recorded():
        return sum(map(len, torch.cuda.memory._snapshot()["device_traces"]))

    before = recorded()
    torch.empty(MIB, dtype=torch.uint8, device="cuda")
    assert recorded() == before  # it costs nothing once the step is over
