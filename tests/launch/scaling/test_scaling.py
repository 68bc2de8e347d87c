"""The whole command: on losses of a known law, whose coefficients it finds, and on real runs of small models."""

import itertools
import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest

from launch import cli
from launch.cluster.printed import job_of
from launch.scaling import command, cost, pictures, rates, slurm
from launch.scaling.ladder import Shape
from launch.scaling.outcomes import Outcome
from launch.scaling.plan import Laws, Setting, plan
from launch.trainings.train_all import is_complete
from model.problems import BadInput
from tests.launch.scaling import known
from tests.launch.trainings.session import Session
from tests.launch.wandb_parts import logged_keys
from tests.train.checkpoint import runs

KNOWN = [
    *["scaling.rate_budgets=[1e10,1e11,1e12]", "scaling.rates=[2e-3,3e-3,5e-3,7e-3,1e-2,1.4e-2,2e-2,2.8e-2,4e-2]"],
    *["scaling.batches=[8,16,24,32,48,64,96,128]", "scaling.budgets=[4e11,1e12,2.5e12,6.25e12,1.6e13]"],
    *["scaling.parallel_runs=7", "wandb.mode=disabled"],
]
COARSE = ["scaling.rate_budgets=[1e11,1e12]", "scaling.rates=[5e-3,1e-2,2e-2]", "scaling.batches=[16,32,64,128]"]


@pytest.fixture(scope="module")
def small(overrides):
    """The recipe of a small run, without what a study sets."""
    return [text for text in overrides if not text.startswith(("model.d_ff", "train.global_batch"))]


@pytest.fixture(scope="module")
def of_known_law(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("known") / "it's kept"
    arguments = [*small, *KNOWN, f"scaling.dir={folder}"]
    trains = known.Known()
    assert command.study(arguments, trains, lambda trainings: []) == 0
    return arguments, folder, json.loads((folder / "scaling.json").read_text()), trains


@pytest.fixture
def nothing_drawn(monkeypatch):
    """Pictures and the estimate of time are another test's."""
    monkeypatch.setattr(command, "draw", lambda found, folder: [])
    monkeypatch.setattr(command, "cost_of", lambda study, settings: "")


def within(interval, value):
    low, high = interval
    return low <= value <= high


def test_the_laws_that_losses_were_made_by_lie_within_their_intervals(of_known_law):
    _, _, found, _ = of_known_law
    laws = {"lr": known.LR, "batch_tokens": known.BATCH}
    for name, law in laws.items():
        fitted = found["rates"][name]
        assert within(fitted["exponent_interval"], law.exponent), (name, fitted)
        assert within(fitted["coefficient_interval"], law.coefficient), (name, fitted)
        assert fitted["exponent"] == pytest.approx(law.exponent, abs=0.05)
        assert fitted["fitted"] == [1e10, 1e12]
    m, tokens = found["allocation"]["m"], found["allocation"]["tokens"]
    assert within(m["exponent_interval"], known.M_OPT.exponent) and m["exponent_interval"][1] < 0.6
    assert within(m["coefficient_interval"], known.M_OPT.coefficient)
    assert m["exponent"] == pytest.approx(known.M_OPT.exponent, abs=0.04)
    assert m["exponent"] + tokens["exponent"] == pytest.approx(1)
    assert m["coefficient"] * tokens["coefficient"] == pytest.approx(1)
    assert within(tokens["exponent_interval"], 1 - known.M_OPT.exponent)


def test_the_largest_compute_is_predicted_from_the_others(of_known_law):
    _, _, found, _ = of_known_law
    held = found["allocation"]["held_out"]
    assert held["compute"] == 1.6e13 and held["fitted"] == [4e11, 6.25e12]
    best_m = known.M_OPT.at(1.6e13)
    lr, batch = known.LR.at(1.6e13), known.BATCH.at(1.6e13)
    assert held["measured"] == pytest.approx(known.loss_of(best_m, 1.6e13 / best_m, lr, batch), rel=0.01)
    without, with_floor = held["predictions"]
    assert (without["law"], with_floor["law"]) == ("C^-a", "floor + C^-a")
    for one in (without, with_floor):
        assert one["error"] == pytest.approx(one["loss"] / held["measured"] - 1) and abs(one["error"]) < 0.02
        assert one["interval"][0] < one["loss"] < one["interval"][1]
    assert found["allocation"]["loss"]["floor_interval"][0] <= known.FLOOR <= 2.2


def test_the_runs_are_trained_by_what_the_grid_found(of_known_law):
    arguments, _, found, trains = of_known_law
    study = plan(arguments)
    kinds = [name.partition("-")[0] for name in trains.trained]
    assert kinds == ["rate"] * 3 * 9 * 8 + ["isoflop"] * 5 * 5 and set(trains.at_once) == {7}
    rates = found["rates"]
    for run in found["runs"]:
        if run["kind"] == "isoflop":
            law = rates["lr"]["coefficient"] * run["budget"] ** rates["lr"]["exponent"]
            assert run["lr"] == pytest.approx(law, rel=0.01)
            batch = rates["batch_tokens"]["coefficient"] * run["budget"] ** rates["batch_tokens"]["exponent"]
            assert abs(run["batch_tokens"] - min(batch, 128 * 32)) <= study.unit * 32
            assert run["compute"] == run["m"] * run["tokens"] == pytest.approx(run["budget"], rel=0.025)
    assert (study.folder / "isoflop" / trains.trained[-1] / "summary.json").exists()


def test_computes_stand_beside_each_other_below_their_axes(of_known_law, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(pictures, "_saved", lambda figure, path: figures.append(figure) or path)
    found = of_known_law[2]
    losses = [math.inf if run["loss"] is None else run["loss"] for run in found["runs"]]  # JSON has no infinity
    runs_of = [run | {"loss": loss} for run, loss in zip(found["runs"], losses, strict=True)]
    a_decade = found["allocation"] | {"curves": found["allocation"]["curves"][:4], "held_out": None}
    pictures.draw(found | {"runs": runs_of, "allocation": a_decade}, tmp_path)
    seen = 0
    for axes in (axes for figure in figures for axes in figure.axes if axes.get_xlabel().startswith("compute")):
        axes.figure.canvas.draw()
        said = [label for label in axes.get_xticklabels(which="both") if label.get_text()]
        boxes = sorted((label.get_window_extent() for label in said), key=lambda box: box.x0)
        assert len(boxes) >= 3 and all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))
        seen += 1
    assert seen == 5  # batch, rate, M, tokens, loss


def test_text_and_pictures_say_what_was_found(of_known_law):
    _, folder, found, _ = of_known_law
    written = (folder / "scaling.txt").read_text()
    assert max(map(len, written.splitlines())) <= 118 and "…" not in written.split("to be known:")[0]
    text = " ".join(written.split())
    m = found["allocation"]["m"]
    assert f"{m['coefficient']:.4g} C^{m['exponent']:.4f}" in text and "0.1715 C^0.5243" in text
    assert f"{found['allocation']['held_out']['predictions'][1]['error']:+.2%} off" in text
    diverged = [run for run in found["runs"] if run["loss"] is None]
    assert diverged and f"{len(diverged)} of {len(found['runs'])} runs diverged" in text
    assert "times less than the paper's smallest" in text and "one seed" in text
    assert "1.6e+13 FLOPs: the batch" in text and "is held to what was tried" in text
    for name in ("grid", "rates", "isoflop", "loss"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(of_known_law, capsys):
    arguments, folder, found, _ = of_known_law
    again = known.Known()
    assert command.study(arguments, again, lambda trainings: []) == 0
    assert again.trained == [] and json.loads((folder / "scaling.json").read_text()) == found
    said = capsys.readouterr()
    assert f"{len(found['runs'])} runs, {len(found['runs'])} of them done" in said.err
    assert (folder / "scaling.txt").read_text() in said.out
    larger = [text.replace("1.6e13]", "1.6e13,4e13]") for text in arguments]
    planned, laws = plan(larger), plan(arguments)
    assert planned.folder == laws.folder and len(planned.isoflop(None)) == 30


def test_a_study_that_was_stopped_goes_on_and_a_larger_grid_trains_isoflop_runs_anew(
    small, tmp_path, nothing_drawn, capsys
):
    arguments = [*small, *KNOWN, *COARSE, f"scaling.dir={tmp_path}", "scaling.seeds=[1,2]"]
    for stop_after in (20, 40):  # within the grid, and within the IsoFLOP runs
        trains = known.Known(stop_after=stop_after)
        assert command.study(arguments, trains, lambda trainings: []) == 0
        assert len(trains.trained) == stop_after and not (tmp_path / "scaling.json").exists()
    rest = known.Known()
    assert command.study(arguments, rest, lambda trainings: []) == 0
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert len(rest.trained) == len(found["runs"]) - 60 == 2 * (2 * 3 * 4 + 25) - 60
    assert any("2 seeds: losses of one setting have a standard deviation of 0.0" in note for note in found["notes"])
    assert "not used" not in capsys.readouterr().err
    more = known.Known()
    assert command.study([*arguments, "scaling.rates=[5e-3,8e-3,1e-2,2e-2]"], more, lambda trainings: []) == 0
    assert len([name for name in more.trained if name.startswith("isoflop")]) == 50
    said = capsys.readouterr().err
    assert "50 finished runs there are of another compute, model, rate, batch or seed, and not used" in said


def test_minima_outside_of_what_was_measured_are_said_and_left_out(small, tmp_path, nothing_drawn):
    shapes = "scaling.shapes=[1x8,1x16,2x16,2x24]"  # all too small
    arguments = [*small, *KNOWN, *COARSE, "model.head_dim=8", f"scaling.dir={tmp_path}", shapes]
    assert command.study(arguments, known.Known(noise=0.0), lambda trainings: []) == 0
    found = json.loads((tmp_path / "scaling.json").read_text())
    text = " ".join((tmp_path / "scaling.txt").read_text().split())
    assert found["allocation"]["m"] is None and not any(c["measured"] for c in found["allocation"]["curves"])
    assert "no law of M and of tokens: fewer than two computes" in text
    assert "above the largest size, and the law of M is without it; larger scaling.shapes would measure it" in text
    assert "of 5 of the 5 computes the least loss is the best run's" in text
    assert "4 sizes are few for a parabola" in text


def test_one_near_optimal_value_of_each_compute_leaves_no_interval():
    def tried(budget, lr, batch, loss):
        setting = Setting("rate", budget, Shape(2, 32), 10_000, lr, batch, 32, 1)
        return Outcome(setting, loss)

    grid = [tried(budget, lr, batch, 2.0 + (lr != best)) for budget, best in ((1e11, 1e-2), (1e12, 5e-3))
            for lr in (5e-3, 1e-2) for batch in (8, 16)]  # fmt: skip
    found = rates.as_found(grid)
    assert found["lr"]["exponent"] < 0 and found["lr"]["exponent_interval"] is None
    assert found["lr"]["coefficient_interval"] is None and found["batch_tokens"]["exponent_interval"][0] < 0
    one_compute = [*grid, tried(1e12, 6e-3, 8, 2.001)]  # of the other one the best rate is still the only one
    assert rates.as_found(one_compute)["lr"]["exponent_interval"] is None
    both = rates.as_found([*one_compute, tried(1e11, 2e-2, 8, 2.001)])["lr"]["exponent_interval"]
    assert both[0] < both[1]


def test_what_is_known_is_written_where_every_isoflop_run_has_diverged(small, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "cost_of", lambda study, settings: "")
    monkeypatch.setattr(known, "loss_of", lambda m, tokens, lr, batch: float("nan") if m * tokens > 3e11 else 2.0 + lr)
    grid = ["scaling.rate_budgets=[1e10,1e11]", "scaling.rates=[5e-3,5.1e-3]", "scaling.batches=[16]"]
    arguments = [*small, *KNOWN, *grid, f"scaling.dir={tmp_path}"]
    assert command.study(arguments, known.Known(noise=0.0), lambda trainings: []) == 0
    found, text = json.loads((tmp_path / "scaling.json").read_text()), (tmp_path / "scaling.txt").read_text()
    assert found["allocation"]["curves"] == [] and "every IsoFLOP run diverged: there are no laws" in text
    assert "no intervals of the batch: fewer than two computes have several" in " ".join(text.split()) and "[?]" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"grid.png", "rates.png"}


def test_a_grid_without_any_loss_ends_the_study_before_more_is_trained(small, tmp_path, nothing_drawn):
    trains = known.Known()
    with pytest.raises(BadInput, match=r"every run of 1e\+13 FLOPs diverged; lower scaling.rates would work"):
        command.study(
            [*small, *KNOWN, "scaling.rates=[0.05,0.1]", "scaling.rate_budgets=[1e10,1e13]", f"scaling.dir={tmp_path}"],
            trains,
            lambda trainings: [],
        )
    assert len(trains.trained) == 2 * 2 * 8


def test_a_folder_of_another_run_is_no_loss_of_this_one(small, tmp_path, nothing_drawn):
    arguments = [*small, *KNOWN, *COARSE, f"scaling.dir={tmp_path}"]
    study, trains = plan(arguments), known.Known(stop_after=3)
    command.study(arguments, trains, lambda trainings: [])
    for one in study.grid()[:2]:
        metrics = study.training(one).run_dir / "metrics.jsonl"
        metrics.write_text(metrics.read_text().replace('"step": ', '"step": 9'))
    with pytest.raises(BadInput) as error:
        command.study(arguments, known.Known(), lambda trainings: [])
    assert len(error.value.problems) == 2 and "has no validation loss after step" in error.value.problems[0]


REAL = [
    *["model.head_dim=8", "scaling.shapes=[1x8,1x16,2x16]", "scaling.budgets=[6.5e7,7e7,8e7]"],
    *["scaling.rates=[3e-3,1e-2]", "scaling.batches=[2]", "scaling.rate_budgets=[1e7,2e7]", "train.val_sequences=4"],
]


@pytest.mark.launch
def test_real_runs_are_stopped_gone_on_with_and_fitted(small, tmp_path, capsys):
    arguments = [*small, *REAL, f"scaling.dir={tmp_path}"]
    stopped = Session(tmp_path, stop_after=1)
    assert command.study(arguments, stopped) == 0
    assert "the same command goes on" in capsys.readouterr().err and not (tmp_path / "scaling.json").exists()
    done = {path.name for path in tmp_path.glob("*/*") if is_complete(path)}
    goes_on = Session(tmp_path)
    assert command.study(arguments, goes_on) == 0
    assert done and not done & {*goes_on.began}
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert len(found["runs"]) == 4 + 9 == len(done) + len(goes_on.began)
    for run in found["runs"]:
        folder = tmp_path / ("rates" if run["kind"] == "rate" else "isoflop") / run["name"]
        last = runs.metrics(folder)[-1]
        assert (last["step"], last["tokens"]) == (run["steps"], run["tokens"])
        assert last["val_loss"] == run["loss"] and last["val_bits_per_byte"] == run["bits_per_byte"]
        started = json.loads((folder / "summary.json").read_text())
        assert started["complete"] and started["tokens"] == run["tokens"]
    assert {"runs", "isoflop_minima", "grid", "rates", "isoflop", "loss"} <= logged_keys(tmp_path)


def test_each_run_of_an_array_is_started_with_what_is_its_own(small, tmp_path, capsys, monkeypatch):
    few = ["scaling.rate_budgets=[1e11,1e12]", "scaling.rates=[5e-3,1e-2]", "scaling.batches=[32]", "scaling.sizes=3"]
    few += ["scaling.budgets=[1e12,2e12,4e12]", f"scaling.dir={tmp_path / 'on nodes'}"]
    arguments = [*small, *KNOWN, *few]
    options = ["scaling", *arguments, "--print", "slurm", "--gpus-per-node", "8"]

    def printed():
        assert cli.main(options) == 0
        return capsys.readouterr()

    study, first = plan(arguments), printed()
    script = first.out
    grid = study.grid()
    assert f"#SBATCH --array=0-{len(grid) - 1}\n" in script and "--gpus-per-node=1\n" in script
    assert "#SBATCH --exclusive\n" in script and "each run takes 1 of the 8 GPUs of a node" in first.err
    one_gpu = [*options[:-1], "1"]
    monkeypatch.setattr(slurm, "job_of", lambda *given: replace(job_of(*given), said=["Mind the gap."]))
    assert cli.main(one_gpu) == 0
    said = capsys.readouterr().err.splitlines()
    assert said.count("Mind the gap.") == 1 and not any("of the" in line for line in said), said
    known.Known(stop_after=1)([study.training(one) for one in grid], at_once=None)
    script = printed().out
    assert "#SBATCH --array=0-2\n" in script and "The same command with --print then prints the runs" in script
    says = tmp_path / "says"
    says.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    says.chmod(0o755)
    for task in (0, 2):
        text = script.replace(f"{sys.executable} -m", f"{shlex.quote(str(says))} -m")
        done = subprocess.run(["bash"], input=text, env={"SLURM_ARRAY_TASK_ID": str(task)}, text=True, stdout=-1)
        assert done.returncode == 0
        started = done.stdout.splitlines()
        assert started[:5] == ["-m", "deepnarrow", "launch", "--gpus-per-node", "1"]
        assert started[5:] == study.training(grid[task + 1]).arguments
    known.Known()([study.training(one) for one in grid], at_once=None)
    script = printed().out
    isoflop = study.isoflop(command._laws(study, grid))
    assert "#SBATCH --array=0-8\n" in script and "then fits the laws" in script and f"lr={isoflop[0].lr!r}" in script
    known.Known()([study.training(one) for one in isoflop], at_once=None)
    said = printed()
    assert said.out == "" and "all runs are done; the same command without --print fits" in said.err


def test_the_command_is_there(small, tmp_path, monkeypatch, capsys):
    given = []
    monkeypatch.setattr(command, "study", lambda overrides: given.append(overrides) or 0)
    assert cli.main(["scaling", *small, "scaling.sizes=4"]) == 0 and given == [[*small, "scaling.sizes=4"]]
    assert cli.main(["scaling", "--gpus-per-node", "8"]) == 2
    assert "with --print slurm it would" in capsys.readouterr().err


def test_time_on_gpus_counts_starts_steps_and_the_gpus_that_runs_may_take(small, monkeypatch):
    monkeypatch.setattr(cost.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cost.torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(cost, "peak_flops", lambda device: 1e15)

    def seconds(*more):
        study = plan([*small, "scaling.dir=/nowhere/yet", "scaling.rate_budgets=[]", *more])
        return cost.seconds_of(study, study.isoflop(None)), study.isoflop(None)

    alone, settings = seconds("scaling.parallel_runs=1")
    least = sum(cost.GPU_START_SECONDS + cost.GPU_STEP_SECONDS * one.steps for one in settings)
    assert least < alone < 1.01 * least  # the FLOPs of such small models are next to nothing
    assert seconds("scaling.parallel_runs=2")[0] == pytest.approx(alone / 2)
    assert seconds("scaling.parallel_runs=2", "parallel.tp=4")[0] == pytest.approx(alone / 2, rel=0.01)
    assert seconds("scaling.parallel_runs=4", "parallel.tp=4")[0] == pytest.approx(alone / 2, rel=0.01)  # of 8 GPUs
    longest = max(cost.GPU_START_SECONDS + cost.GPU_STEP_SECONDS * one.steps for one in settings)
    assert "min here, reckoned by 30% of a GPU's peak and not measured" in cost._about(alone)
    assert alone / 8 < longest < seconds()[0] < 1.01 * longest  # the others are over before it


def test_models_are_timed_while_as_many_cores_are_busy_as_will_be(small, monkeypatch):
    """Two runs at a time took half as long again as was said: each of two cores is slower while the other computes."""

    def busy():
        return sum("-IS" in child.cmdline() for child in psutil.Process().children())

    seen = []
    monkeypatch.setattr(cost, "_pass_seconds", lambda *given: seen.append(busy()) or 1e-3)
    study = plan([*small, "scaling.dir=/nowhere/yet"])
    assert cost.seconds_of(study, study.isoflop(None)) > 0
    assert set(seen) == {len(os.sched_getaffinity(0)) - 1} and busy() == 0


def test_rates_of_laws_are_held_to_what_was_tried(small):
    study = plan([*small, "scaling.dir=/nowhere/yet"])
    high = Laws(known.PowerLaw(1.0, 0.0), known.PowerLaw(1e9, 0.0))
    assert study.rate_and_batch(1e12, high) == (2.4e-2, 16)
    low = Laws(known.PowerLaw(1e-9, 0.0), known.PowerLaw(1.0, 0.0))
    assert study.rate_and_batch(1e12, low) == (1.5e-3, 4)
    between = Laws(known.PowerLaw(0.0123456, 0.0), known.PowerLaw(11 * 32, 0.0))
    assert study.rate_and_batch(1e12, between) == (0.0123, 12)  # a multiple of the micro-batch of 2
