import pytest

from conf.validate import Machine, validate, warnings
from tests.shapes import preset

CPU = Machine(gpus=0)


def problems(*overrides, machine=CPU):
    return validate(preset(*overrides), machine)[1]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.pp=9"], ["parallel.pp=9", "8 layers", "parallel.pp=8"]),
        (["parallel.pp=0"], ["parallel.pp=0", "at least 1"]),
        (["model.n_heads=7", "model.n_kv_heads=7"], ["model.n_heads=7", "model.d_model=128", "model.n_heads=8"]),
        (["model.n_kv_heads=3"], ["model.n_kv_heads=3", "model.n_heads=4", "model.n_kv_heads=4"]),
        (
            ["train.global_batch=15", "train.micro_batch=2"],
            ["train.global_batch=15", "2 x 1", "14 or train.global_batch=16"],
        ),
        (["train.seq_len=512"], ["train.seq_len=512", "model.max_seq_len=256"]),
        (["parallel.tp=3", "model.d_ff=513", "train.seq_len=255"], ["parallel.tp=3", "model.n_heads=4"]),
        (
            ["parallel.tp=2", "train.seq_len=255"],
            ["train.seq_len=255", "parallel.tp=2", "train.seq_len=254 or train.seq_len=256", "sequence_parallel=false"],
        ),
        (["train.micro_batch=0"], ["train.micro_batch=0", "at least 1"]),
        (["optimizer.lr=0"], ["optimizer.lr=0", "above 0"]),
        (["optimizer.beta2=1.0"], ["optimizer.beta2=1.0", "below 1"]),
        (["optimizer.clip=-1"], ["optimizer.clip=-1", "null"]),
        (["schedule.step_at=[0.9]"], ["schedule.step_at=[0.9]", "equally many"]),
        (["schedule.step_at=[0.9,0.8]"], ["schedule.step_at=[0.9, 0.8]", "rise"]),
        (["train.max_steps=0"], ["train.max_steps=0", "null"]),
        (["train.total_tokens=0"], ["train.total_tokens=0", "at least 1"]),
        (["train.total_tokens=inf"], ["train.total_tokens=inf", "finite"]),
        (["optimizer.lr=inf"], ["optimizer.lr=inf", "finite"]),
        (["parallel.schedule=zbv"], ["parallel.schedule=zbv", "parallel.pp=1 is no pipeline"]),
        (
            ["parallel.pp=4", "parallel.schedule=interleaved", "train.global_batch=12", "train.micro_batch=2"],
            ["train.global_batch=12: makes 6 micro-batches of 2", "train.global_batch=8 or train.global_batch=16"],
        ),
        (
            ["parallel.pp=4", "parallel.schedule=interleaved", "parallel.virtual_stages=3"],
            ["parallel.virtual_stages=3: 12 stages", "10 layers", "parallel.virtual_stages=2 is the most"],
        ),
        (["train.timeline_at=[0]"], ["train.timeline_at=[0]", "count from 1"]),
        (["train.profile=[3,0]"], ["train.profile=[3, 0]", "count from 1"]),
        (["train.profile_ranks=[0,-1]"], ["train.profile_ranks=[0, -1]", "a run of one process has rank 0"]),
        (
            ["parallel.pp=2", "train.profile_ranks=[2]"],
            ["train.profile_ranks=[2]: 0 to 1 are those of dp1 x pp2 x tp1"],
        ),
        (["train.val_at=[0]"], ["train.val_at=[0]", "count from 1"]),
        (["train.log_every=0"], ["train.log_every=0: must be at least 1, or null for a line a minute"]),
        (["sample.temperature=nan"], ["sample.temperature=nan", "0 (the likeliest token) or above"]),
    ],
)
def test_each_impossible_setting_names_key_value_and_what_would_work(overrides, said):
    found = problems("tiny", *overrides)
    assert len(found) == 1, found
    assert all(part in found[0] for part in said), found[0]
    assert "\n" not in found[0]


def test_all_problems_come_at_once():
    found = problems(
        "tiny",
        "parallel.pp=30",
        "model.n_kv_heads=3",
        "train.micro_batch=2",
        "train.global_batch=15",
        "train.seq_len=999",
    )
    assert len(found) == 4


def test_processes_are_counted_from_the_layout_or_the_machine():
    def layout(*overrides, machine):
        return validate(preset("tiny", *overrides), machine)[0]

    assert layout("parallel.pp=2", machine=CPU).world_size == 2
    assert layout("parallel.pp=2", "parallel.dp=2", machine=CPU).world_size == 4
    assert layout("parallel.pp=2", machine=Machine(gpus=8)).dp == 4
    assert layout("parallel.pp=2", machine=Machine(gpus=8, local_processes=8, processes=64)).dp == 32


def test_kernels_of_gpus_are_refused_where_there_is_none():
    asked = ["tiny", "model.attention=flash3", "model.kernels=liger"]
    assert problems(*asked) == [
        "model.attention=flash3: runs on GPUs, and this machine has none; model.attention=auto takes what there is",
        "model.kernels=liger: runs on GPUs, and this machine has none; model.kernels=auto takes what there is",
    ]
    assert problems(*asked, machine=Machine(gpus=0, elsewhere=True)) == []
    assert problems(*asked, machine=Machine(gpus=1)) == problems("tiny", "model.attention=sdpa") == []


def test_ranks_to_profile_are_those_of_the_whole_layout():
    profiled = ["tiny", "parallel.pp=2", "train.profile_ranks=[0,7]"]
    assert problems(*profiled, machine=Machine(gpus=8)) == []
    assert problems(*profiled, machine=Machine(gpus=4, local_processes=4, processes=8)) == []
    assert "0 to 3 are those of dp2 x pp2 x tp1" in problems(*profiled, "parallel.dp=2")[0]
    # a login node does not know how many replicas there will be, unless it is told
    assert problems(*profiled, machine=Machine(gpus=0, elsewhere=True)) == []
    assert "0 to 3" in problems(*profiled, "parallel.dp=2", machine=Machine(gpus=0, elsewhere=True))[0]


def test_processes_that_do_not_fit_the_layout():
    started = Machine(gpus=0, local_processes=6, processes=6)
    assert "parallel.pp=4: 6 processes" in problems("tiny", "parallel.pp=4", machine=started)[0]
    assert "4 or 8 processes" in problems("tiny", "parallel.pp=4", machine=started)[0]
    assert "parallel.dp=2: dp x pp x tp = 2 x 2 x 1 needs 4" in problems(
        "tiny", "parallel.pp=2", "parallel.dp=2", machine=started
    )[0]  # fmt: skip


def test_tensor_parallel_ranks_count_and_may_not_span_machines_in_silence():
    config = preset("tiny", "parallel.pp=2", "parallel.tp=2")
    layout, found = validate(config, CPU)
    assert found == [] and (layout.world_size, layout.tp, layout.sequence_parallel) == (4, 2, True)
    assert warnings(config, layout, Machine(gpus=0, local_processes=4, processes=4)) == []
    assert "over machines" in warnings(config, layout, Machine(gpus=0, local_processes=3, processes=12))[0]
    assert "parallel.pp=2 parallel.tp=2: 6 processes" in validate(config, Machine(0, 6, 6))[1][0]
    assert (
        validate(preset("tiny", "parallel.tp=2", "parallel.sequence_parallel=false"), CPU)[0].sequence_parallel is False
    )
    ignored = preset("tiny", "parallel.sequence_parallel=true")
    assert "ignored" in warnings(ignored, validate(ignored, CPU)[0], CPU)[0]


def test_a_window_that_no_sequence_feels_is_warned_of():
    def said(*overrides):
        config = preset("tiny", "train.seq_len=128", *overrides)
        layout, found = validate(config, CPU)
        assert found == []
        return warnings(config, layout, CPU)

    (line,) = said("model.window=128")
    assert line.startswith("model.window=128: no sequence of the run is longer than 128 tokens")
    assert said("model.window=127") == []
    assert said("model.window=128", "data.stages=[{until: 1e5}, {until: 1e13, seq_len: 256}]") == []


def test_more_processes_than_gpus():
    four = Machine(gpus=4)
    assert problems("tiny", "parallel.pp=4", machine=four) == []
    assert "parallel.pp=8" in problems("tiny", "parallel.pp=8", machine=four)[0]
    assert "this machine has 4 GPUs" in problems("tiny", "parallel.pp=8", machine=four)[0]
    assert "parallel.dp=4" in problems("tiny", "parallel.pp=2", "parallel.dp=4", machine=four)[0]
    launched = Machine(gpus=4, local_processes=8, processes=8)
    assert "--num_gpus=8" in problems("tiny", "parallel.pp=8", machine=launched)[0]
    # the rest of the processes may be on other hosts
    assert problems("tiny", "parallel.pp=8", machine=Machine(gpus=4, local_processes=4, processes=8)) == []
