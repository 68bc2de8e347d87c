"""What `parallel/deepspeed_engine.py` relies on inside DeepSpeed: an upgrade that moves it fails here, by name."""

import inspect

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel.groups import make_ranks
from parallel.layout import Layout
from parallel.schedules import Placement

ds = pytest.importorskip("deepspeed")

OVERRIDDEN = {
    "_broadcast_model": ["self"],
    "_train_schedule": ["self"],
    "_inference_schedule": ["self", "micro_batches"],
    "_exec_schedule": ["self", "pipe_schedule"],
    "is_first_stage": ["self"],
    "is_last_stage": ["self"],
    "_aggregate_total_loss": ["self"],
    "_reduce_outputs": ["self", "outputs", "reduce", "reduce_dp", "micro_batches"],
    "_bcast_pipe_scalar": ["self", "data", "src_rank", "dtype"],
}
"""Methods of PipelineEngine in the place of which ours stand, with their parameters."""


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_methods_that_are_overridden_are_there(name):
    from deepspeed.runtime.pipe.engine import PipelineEngine

    assert [*inspect.signature(getattr(PipelineEngine, name)).parameters] == OVERRIDDEN[name]


def test_nothing_else_of_the_engine_is_overridden():
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from parallel.deepspeed_engine import StageEngine

    ours = {name for name in vars(StageEngine) if not name.startswith("__")}
    assert {name for name in ours if hasattr(PipelineEngine, name)} == {*OVERRIDDEN}


@pytest.mark.parametrize(
    ("method", "calls"),
    [
        ("train_batch", ["self._train_schedule()", "self._exec_schedule(", "self._aggregate_total_loss()"]),
        ("eval_batch", ["self._inference_schedule(", "self._exec_schedule(", "self._reduce_outputs(self.fwd_outputs"]),
    ],
)
def test_a_step_is_framed_as_it_was(method, calls):
    from deepspeed.runtime.pipe.engine import PipelineEngine

    text = inspect.getsource(getattr(PipelineEngine, method))
    at = [text.index(call) for call in calls]
    assert at == sorted(at)


def test_initialize_makes_an_engine_as_we_do():
    """It takes no class of ours; these are its steps, for a model in stages, that are not for other features."""
    text = inspect.getsource(ds.initialize)
    branch = text[text.index("mpu = model.mpu()") :]
    assert "config_class = DeepSpeedConfig(config, mpu)" in branch
    for argument in ("args", "model", "mpu", "config", "config_class"):
        assert f"{argument}={argument}" in branch[: branch.index("zero.partition_parameters")], argument


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    made = []
    for name in ("new_group", "split_group"):
        real = getattr(dist, name)
        counted = lambda *args, real=real, **more: made.append(args) or real(*args, **more)  # noqa: E731
        monkeypatch.setattr(dist, name, counted)
        monkeypatch.setattr(dist.distributed_c10d, name, counted)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from parallel.deepspeed_engine import quiet

    with quiet():
        ds.init_distributed("gloo", auto_mpi_discovery=False, dist_init_required=False)
    yield made
    dist.destroy_process_group()


def test_an_engine_frames_what_it_is_given_and_opens_no_group(alone):
    from parallel.deepspeed_engine import StageEngine, quiet

    layer = nn.Linear(2, 2)
    seen = []
    with quiet():
        engine = StageEngine(
            [layer],
            make_ranks(Layout(1, 1), Placement(1), 1),
            micro_batch=3,
            accumulation=4,
            train=lambda batches: seen.append(("train", torch.is_grad_enabled(), next(batches))) or "stepped",
            evaluate=lambda batches, number: (
                seen.append(("eval", torch.is_grad_enabled(), next(batches), number)) or 2.5
            ),
        )
    assert engine.train_batch(iter("a")) == "stepped"
    assert engine.eval_batch(iter("b"), num_micro_batches=7) == 2.5
    assert seen == [("train", True, "a"), ("eval", False, "b", 7)]
    assert engine.train_batch_size() == 12 and engine.gradient_accumulation_steps() == 4
    engine.set_train_batch_size(6)  # a step with half as many micro-batches
    assert engine.train_batch_size() == 6 and engine.gradient_accumulation_steps() == engine.micro_batches == 2
    assert engine.train_batch(iter("c")) == "stepped" and seen[-1] == ("train", True, "c")
    assert [*engine.module.parameters()] == [*layer.parameters()]
    assert engine.optimizer is None and not alone
