"""The costs by which stages are cut, layer by layer."""

import pytest
import torch

from parallel import costs
from parallel.layout import Balance
from tests.shapes import small

MODEL = small(n_layers=4, window=5, window_pattern="ssf")
BATCH = {"seq_len": 16, "micro_batch": 1, "device": torch.device("cpu"), "dtype": torch.float32}


def test_blocks_are_timed_once_for_each_window_of_the_model(monkeypatch):
    built = []
    block = costs.Block
    monkeypatch.setattr(costs, "Block", lambda config, window: built.append(window) or block(config, window))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda *_, **__: None)
    found = costs.layer_costs(MODEL, Balance.measured, **BATCH)
    assert sorted(built, key=str) == [5, None]
    assert found[1] == found[2] == found[4] != found[3] and len(found) == 6 and min(found) > 0


def test_counted_costs_are_those_of_each_blocks_own_window():
    found = costs.layer_costs(MODEL, Balance.flops, **BATCH)
    assert found == [float(flops) for flops in MODEL.layer_flops(16)]
    assert found[3] - found[1] == pytest.approx(2 * 4 * 16 * (16 - 10 + 25 / 16), abs=1)
