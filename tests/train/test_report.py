"""A step in figures: merged over ranks that a test plays, and turned into a record."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from model.config import ModelConfig
from parallel.engine import StepResult
from parallel.layout import Layout
from parallel.schedules import Action, Pass
from parallel.simulation import Span
from train import report as report_module
from train.agreement import max_over_ranks
from train.length import StepSize
from train.report import RunConstants, StepReport, as_record, own_report

LAYOUT = Layout(dp=1, pp=2)
MODEL = ModelConfig(n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_ff=32, vocab_size=64, max_seq_len=100)
SPANS = [
    [Span(Action(Pass.F, 0, 0), 0.0, 1.0), Span(Action(Pass.B, 0, 0), 6.0, 8.0)],
    [Span(Action(Pass.F, 1, 0), 1.5, 2.5), Span(Action(Pass.B, 1, 0), 2.5, 5.5)],
]


def result(spans=(), skipped=False):
    flops = MODEL.attention_flops([25] * 32)
    return StepResult(2.0, 0.5, skipped=skipped, attention_flops=flops, spans=list(spans), began=0.0)


def opened(rank, *, asked=None, due=False, busy=False, layout=LAYOUT):
    saver = SimpleNamespace(due=lambda step: due, busy=busy)
    signals = SimpleNamespace(asked=asked)
    stragglers = SimpleNamespace(measured=lambda spans, kind: [(0.0, len(spans))[n == rank] for n in range(2)])
    run = SimpleNamespace(layout=layout, rank=rank, device=torch.device("cpu"), saver=saver, signals=signals)
    run.stragglers, run.kind = stragglers, lambda step: [8, 100, {}]
    return run


def own(rank, **facts):
    return own_report(opened(rank, **facts), 7, result(SPANS[rank]))


def merged(monkeypatch, *reports):
    """As all of them know it; each rank would hand the same to the collective."""
    handed, calls = [], []
    monkeypatch.setattr(report_module, "max_over_ranks", lambda values, group: handed.append(values) or values)
    for one in reports:
        one.merged(None)

    def highest(values, group):
        calls.append(values)
        return [max(column) for column in zip(*handed, strict=True)]

    monkeypatch.setattr(report_module, "max_over_ranks", highest)
    found = reports[0].merged(None)
    assert len(calls) == 1  # one collective, whatever there is to say
    return found


def test_ranks_know_the_largest_of_each_field_and_each_stage_at_its_place(monkeypatch):
    monkeypatch.setattr(report_module, "peak_memory", lambda device: 3 * 2**30)
    found = merged(monkeypatch, own(0, due=True), own(1, asked=15, due=True, busy=True))
    assert found == StepReport(
        told_to_stop=True,
        save_due=True,
        save_busy=True,
        memory_gib=[3.0, 3.0],
        forward_seconds=[1.0, 1.0],
        backward_seconds=[2.0, 3.0],
        weight_seconds=[0.0, 0.0],
        last_pass_end=[8.0, 5.5],
        pass_seconds=[2, 2],
    )
    assert [type(getattr(found, each.name)) for each in fields(found)] == [bool] * 3 + [list] * 6


def test_a_save_is_rank_0s_to_ask_for(monkeypatch):
    found = merged(monkeypatch, own(0), own(1, due=True))
    assert not found.told_to_stop and not found.save_due and not found.save_busy


def test_reports_of_a_real_group_of_one(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        one = own(0, due=True)
        assert one.merged(torch.distributed.group.WORLD) == one
        assert max_over_ranks([1.0, 2.0], torch.distributed.group.WORLD) == [1.0, 2.0]
    finally:
        torch.distributed.destroy_process_group()


CONSTANTS = RunConstants(model=MODEL, peak_flops=4e7, bubble_expected={8: 0.25, 16: 0.125})
SIZE = StepSize(samples_before=48, tokens_before=4800, global_batch=8, seq_len=100, stage=0)


def test_the_record_of_a_pipelined_step(monkeypatch):
    monkeypatch.setattr(report_module, "peak_memory", lambda device: 2**29)
    record = as_record(7, SIZE, result(), 1e-3, 10.0, merged(monkeypatch, own(0), own(1)), CONSTANTS)
    assert record == {
        "step": 7,
        "loss": 2.0,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "tokens": 5600,
        "seconds": 10.0,
        "tokens_per_second": 80.0,
        "memory_gib": [0.5, 0.5],
        "forward_seconds": [1.0, 1.0],
        "backward_seconds": [2.0, 3.0],
        "wait_seconds": [5.0, 4.0],
        "bubble": pytest.approx(9 / 16),
        "optimizer_seconds": 2.0,
        "bubble_expected": 0.25,
        # Documents of 25 tokens, whatever the length of a sequence is.
        "flops_per_token": MODEL.flops_per_token(25),
        "mfu": pytest.approx(80 * MODEL.flops_per_token(25) / 4e7),
        "mfu_whole_attention": pytest.approx(80 * MODEL.flops_per_token_whole_attention(25) / 4e7),
    }


def test_one_process_on_a_device_of_unknown_peak_has_neither_passes_nor_mfu():
    alone = own_report(opened(0, layout=Layout(dp=1, pp=1)), 1, result())
    record = as_record(1, SIZE, result(), 1e-3, 10.0, alone, RunConstants(MODEL, None, {}))
    assert set(record) == {
        *["step", "loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_second", "memory_gib", "flops_per_token"]
    }


def test_the_batch_and_the_length_of_a_step_are_recorded_where_they_vary(monkeypatch):
    monkeypatch.setattr(report_module, "peak_memory", lambda device: 2**29)
    size = replace(SIZE, global_batch=16, seq_len=50)
    report, varying = merged(monkeypatch, own(0), own(1)), replace(CONSTANTS, varies=True)
    record = as_record(7, size, result(), 1e-3, 10.0, report, varying)
    assert (record["global_batch"], record["seq_len"], record["tokens"]) == (16, 50, 5600)
    assert record["bubble_expected"] == 0.125
    assert not {"global_batch", "seq_len"} & as_record(7, size, result(), 1e-3, 10.0, report, CONSTANTS).keys()
