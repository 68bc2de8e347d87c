"""What is said of a run that does not fit its GPUs."""

import re
from dataclasses import replace

import pytest

from conf.compose import compose_overrides
from conf.validate import Machine
from launch.describe import as_text, facts
from model.problems import BadInput
from parallel.plan.cluster import Cluster
from parallel.plan.search import fullest
from parallel.stages import split_for, stage_rows
from train import fit
from train.job import job_of
from train.preflight import preflight

GIB = 2**30
LAYOUT = ["model=7b", "parallel.pp=4", "parallel.dp=2", "train.global_batch=64"]


def config_of(*more):
    return compose_overrides([*LAYOUT, *more]).config


def peak_of(*more):
    return fullest(job_of(config_of(*more), num_processes=8))[1].peak


def judged(room, *more):
    """On GPUs with so many bytes for a plan."""
    return fit.judged(config_of(*more), 8, int(room + Cluster().reserved_gib * GIB))


def test_what_fits_and_what_no_gpu_is_there_for_is_not_mentioned():
    assert judged(peak_of() + 1) == ([], [])
    assert fit.judged(config_of(), 8, None) == ([], [])


def test_what_does_not_fit_is_refused_with_the_rank_its_figures_and_the_first_change_that_fits():
    ways = ["none", "selective", "ffn", "full"]
    peaks = [peak_of(f"parallel.recompute={way}") for way in ways]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] * (1 - fit.FORMULA_ERROR) > peaks[2] + Cluster().reserved_gib * GIB, "plainly beyond"
    (problem,), warnings = judged(peaks[2] + 1)
    assert not warnings
    assert "rank 0 of a pipeline" in problem and f"needs {peaks[0] / GIB:.1f} GiB" in problem
    assert "parallel.recompute=ffn would fit" in problem and "launch.force=true" in problem
    parts = [
        float(text) for text in re.search(r"\(([\d.]+) weights.*?, ([\d.]+) act.*?, ([\d.]+) work", problem).groups()
    ]
    assert sum(parts) == pytest.approx(peaks[0] / GIB, abs=0.2)
    (warning,) = judged(peaks[2] + 1, "launch.force=true")[1]
    assert "it is tried" in warning


def test_what_may_fit_after_all_is_tried_with_a_warning():
    problems, (warning,) = judged(peak_of() * 0.99)
    assert not problems and "may be off by 5%" in warning


def test_where_no_recomputation_helps_more_ranks_are_suggested():
    (problem,), _ = judged(5 * GIB)
    assert "parallel.pp" in problem.partition(";")[2] and "would fit" not in problem


def test_a_run_is_refused_before_its_data_are_looked_for(tmp_path):
    words = [*LAYOUT, "data=files", "data.path=[/nowhere]", f"hydra.run.dir={tmp_path / 'run'}"]
    with pytest.raises(BadInput) as raised:
        preflight(words, machine=Machine(gpus=8, gpu_bytes=8 * GIB))
    assert any("GiB" in problem and "launch.force=true" in problem for problem in raised.value.problems)
    assert not (tmp_path / "run").exists()


def test_describe_and_the_refusal_have_one_source():
    config = config_of()
    assert max(rank["peak"] for rank in facts(config)["memory"]) == peak_of()


@pytest.mark.parametrize(("visible", "gib"), [(3, 8), (2, 40), (1, 80), (0, None)])
def test_gpus_that_are_not_visible_refuse_nothing(visible, gib, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '%s\\n' {80 * 1024} {8 * 1024} {40 * 1024}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert fit.smallest_gpu_bytes(visible) == (gib and gib * GIB)
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert fit.smallest_gpu_bytes(3) is None


def test_a_plan_has_the_stages_of_the_run_whatever_the_lengths_of_its_data_stages():
    config = config_of("data.stages=[{until: 1e12}, {until: 2e12, seq_len: 16384}]", "model.max_seq_len=16384")
    stages = split_for(config.model.layer_flops(config.train.seq_len), config.parallel.placement)
    job = job_of(config, num_processes=8)
    assert job.settings.seq_len == 16384 and job.stages == stages != replace(job, cut_at=None).stages
    assert [one["layers"] for one in facts(config)["stages"]] == [
        row["layers"] for row in stage_rows(config.model, stages)
    ]


def test_describe_says_the_precision_that_its_figures_are_of():
    assert "memory in bf16" in as_text(config_of()) and "memory in fp32" in as_text(config_of("train.precision=fp32"))
