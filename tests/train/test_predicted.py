"""What a plan predicts of a run's steps beside what was measured of them."""

from dataclasses import replace

import pytest
import torch

from conf.clusters import cluster_of
from model.problems import BadInput
from parallel.layout import Layout
from parallel.plan.predict import ERROR, predict
from tests.shapes import preset
from train.farewell import closing
from train.job import job_of
from train.length import StepSize, length_of
from train.log_lines import Cost, Pace
from train.predicted import Expected, cluster_here, predicted_terms, problems
from train.preflight import preflight

CPU, LAYOUT = torch.device("cpu"), Layout(dp=2, pp=2)
SIZE = StepSize(0, 0, 16, 256, 0)
CONFIG = preset(
    "tiny", "parallel.pp=2", "parallel.dp=2", "train.global_batch=16", "train.micro_batch=1", "cluster=h100"
)


@pytest.fixture
def on_h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    return torch.device("cuda")


def expected(config=CONFIG, layout=LAYOUT):
    return Expected.of(config, layout, True, CPU)


def prediction():
    cluster = replace(cluster_of("h100"), gpus_per_node=4)
    return predict(replace(job_of(CONFIG), layout=LAYOUT), cluster)


def record(times=1.0, **changed):
    """A step that took what was predicted, or a multiple of it."""
    terms = predicted_terms(prediction()) | changed
    found = {"seconds": times * prediction().seconds}
    for name, key in (("forward", "forward_seconds"), ("backward", "backward_seconds"), ("waiting", "wait_seconds")):
        found[key] = [0.8 * terms[name], 1.2 * terms[name]]  # of two ranks, with that mean
    return {**found, "optimizer_seconds": terms["optimizer"]}


def test_a_record_has_the_seconds_that_the_plan_has():
    of_step = expected().compared(record(), SIZE, True)
    assert of_step == {"predicted_seconds": pytest.approx(prediction().seconds)}
    longer = expected().compared(record(), replace(SIZE, global_batch=32), True)
    assert longer["predicted_seconds"] > 1.3 * of_step["predicted_seconds"]
    shorter = expected().compared(record(), replace(SIZE, seq_len=128), True)
    assert shorter["predicted_seconds"] < of_step["predicted_seconds"]


def test_the_parts_of_a_prediction_are_the_step():
    terms = predicted_terms(prediction())
    assert sum(terms.values()) == pytest.approx(prediction().seconds)
    assert terms["backward"] > terms["forward"] > 0 and terms["weights"] == 0 and terms["optimizer"] > 0


def test_the_term_that_was_off_is_named():
    run, terms = expected(), predicted_terms(prediction())
    for _ in range(3):
        run.compared(record(1.25, forward=1.1 * terms["forward"], backward=2 * terms["backward"]), SIZE, True)
    first, second, third = run.said()
    assert first.endswith("on H100 SXM (data sheet): 1.25 times as long")
    assert f"backward {2 * terms['backward']:.3g} ({terms['backward']:.3g})" in second and "weights" not in second
    assert third == f"most off: backward, {terms['backward']:.3g} s longer than predicted"


def test_a_term_may_be_shorter_than_predicted():
    run, terms = expected(), predicted_terms(prediction())
    run.compared(record(optimizer=0.1 * terms["optimizer"]), SIZE, True)
    assert run.said()[-1].startswith("most off: optimizer, ") and run.said()[-1].endswith("s shorter than predicted")


def test_the_median_of_steps_of_the_last_size_counts():
    run = expected()
    run.compared(record(50.0), SIZE, False)  # the first of a run
    run.compared(record(9.0), replace(SIZE, global_batch=32), True)
    for times in (1.0, 1.1, 7.0):
        run.compared(record(times), SIZE, True)
    assert run.said()[0].endswith(": 1.10 times as long")


def test_a_run_of_one_stage_has_no_terms():
    config = preset("tiny", "train.global_batch=16", "cluster=h100")
    run = Expected.of(config, Layout(1, 1), True, CPU)
    run.compared({"seconds": 1.0}, SIZE, True)
    assert len(run.said()) == 1


def test_without_a_step_that_counts_nothing_is_said():
    assert expected().said() == []


def test_ranks_that_share_cores_have_no_terms_to_compare(tmp_path):
    (tmp_path / "cpu.yaml").write_text("devices_per_node: 2\nmeasured: [products]\n")
    run = expected(replace(CONFIG, cluster=str(tmp_path / "cpu.yaml")))
    run.compared(record(), SIZE, True)
    assert run.said()[-1].startswith("ranks share cores")
    assert "(measured)" in run.said()[0]


def test_without_a_cluster_it_is_said_why_and_nothing_is_compared():
    run = expected(replace(CONFIG, cluster=None))
    assert run.compared(record(), SIZE, True) == {} and run.said() == []
    assert "no preset of a cluster is known for CPUs" in run.announced(length_of(CONFIG))


def test_a_gpu_is_known_by_its_name(on_h100, monkeypatch):
    config = replace(CONFIG, cluster=None)
    cluster, name = cluster_here(config, Layout(dp=4, pp=4), on_h100)
    assert name == "H100 SXM (data sheet)" and (cluster.nodes, cluster.gpus_per_node) == (2, 8)
    monkeypatch.setenv("LOCAL_SIZE", "4")  # as many processes are on each host of the run
    cluster, _ = cluster_here(config, Layout(dp=4, pp=4), on_h100)
    assert (cluster.nodes, cluster.gpus_per_node) == (4, 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert cluster_here(config, LAYOUT, on_h100) == (None, "NVIDIA H100 PCIe")


def test_each_size_of_a_step_is_announced():
    config = preset(
        "tiny", "parallel.pp=2", "parallel.dp=2", "train.micro_batch=1", "cluster=h100",
        'train.global_batch="0:8 20480:16"', "train.total_tokens=1e5",
    )  # fmt: skip
    said = expected(config).announced(length_of(config))
    assert (
        " s, later " in said
        and f"on H100 SXM (data sheet); steps of others were predicted with an error of {ERROR:.0%}" in said
    )


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("h101", "cluster=h101: no such preset as 'h101'; h100 would work"),
        ("nowhere.yaml", "cluster=nowhere.yaml: [Errno 2] No such file"),
    ],
)
def test_a_cluster_that_is_none_is_refused_before_the_run(spec, said, overrides, tmp_path):
    assert problems(replace(CONFIG, cluster=spec))[0].startswith(said)
    with pytest.raises(BadInput) as refused:
        preflight([*overrides, f"cluster={spec}", f"hydra.run.dir={tmp_path}"])
    assert any(problem.startswith(said) for problem in refused.value.problems)


def test_the_closing_lines_have_the_prediction_under_the_speed(tmp_path):
    summary = dict.fromkeys(["diverged", "loss_first", "skipped_steps", "val_loss", "missing_records"])
    summary |= {"complete": True, "steps": 5, "tokens_per_second": 100.0, "wandb": {"mode": "disabled"}}
    lines = closing(summary, 5, [], tmp_path, None, ["1.2 s a step", "most off: forward"]).splitlines()
    at = lines.index("prediction       1.2 s a step")
    assert lines[at - 1].startswith("speed ") and lines[at + 1] == " " * 17 + "most off: forward"


def test_the_price_of_a_cluster_is_that_of_all_ranks_and_stands_in_the_closing_lines(tmp_path):
    (tmp_path / "mine.yaml").write_text("preset: h100\nprice_per_gpu_hour: 2.5\n")
    hourly = expected(replace(CONFIG, cluster=str(tmp_path / "mine.yaml"))).price_per_hour
    assert hourly == 10.0 and expected().price_per_hour is None
    now = [0.0]
    pace = Pace(5, Cost(hourly), lambda: now[0])
    for step in (1, 5):
        now[0] = 864.0 * step
        pace.step({"step": step, "tokens": 1e6 * step, "seconds": 800.0})
    summary = dict.fromkeys(["diverged", "loss_first", "skipped_steps", "val_loss", "missing_records"])
    summary |= {"complete": True, "steps": 5, "tokens_per_second": 1250.0, "wandb": {"mode": "disabled"}}
    lines = closing(summary, 5, [], tmp_path, None, pace=pace).splitlines()
    assert "speed            1,250 tokens/s in steps, 100 million tokens/day with evaluation and saves" in lines
    assert "cost             12.00: 01:12:00 since this start, at 10.00 an hour" in lines
