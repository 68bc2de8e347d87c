"""The whole command: on losses of a known law, whose orderings it finds, and on real runs of small models."""

import json
import math

import pytest

from launch import cli
from launch.depth import command, timing
from launch.depth.plan import plan
from launch.depth.timing import Timed
from launch.trainings.train_all import is_complete
from model.problems import BadInput
from tests.launch.depth import known
from tests.launch.trainings.session import Session
from tests.launch.wandb_parts import logged_keys
from tests.train.checkpoint import runs

KNOWN = [
    *["model.n_layers=8", "model.d_model=64", "model.n_heads=8", "model.n_kv_heads=4", "model.d_ff=176"],
    *["train.seq_len=128", "model.max_seq_len=128", "train.max_steps=50", "optimizer.lr=0.01"],
    *["depth.micro_batches=8", "wandb.mode=disabled"],
]


def played_times(models, *_):
    """Deeper ones are slower."""
    depths = {name: model.n_layers for name, model in models.items()}
    return Timed({name: 1000 / n for name, n in depths.items()}, {name: n / 1000 for name, n in depths.items()}, "cpu")


def study(arguments, trains, check=lambda trainings: []):
    return command.study(arguments, trains, check, played_times)


@pytest.fixture(scope="module")
def small(overrides):
    """The recipe of a small run, without what this study says of it."""
    ours = {text.partition("=")[0] for text in KNOWN}
    return [text for text in overrides if text.partition("=")[0] not in ours]


@pytest.fixture(scope="module")
def of_known_law(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("known") / "it's kept"
    arguments = [*small, *KNOWN, f"depth.dir={folder}"]
    trains = known.Known()
    assert study(arguments, trains) == 0
    return arguments, folder, json.loads((folder / "depth.json").read_text()), trains


def test_each_shape_has_its_rate_and_the_mean_of_its_seeds(of_known_law):
    arguments, _, found, trains = of_known_law
    models = plan(arguments).models
    assert len(trains.trained) == len(set(trains.trained)) == len(models) * 6  # four rates with a seed, two more seeds
    assert sorted(run["name"] for run in found["runs"]) == sorted(trains.trained)
    for shape in found["shapes"]:
        lr = 0.02 if shape["n_layers"] < 8 else 0.01
        losses = {str(seed): known.loss_of(shape["n_layers"], shape["d_model"], lr, seed) for seed in (1, 2, 3)}
        assert shape["lr"] == lr and shape["losses"] == pytest.approx(losses)
        assert shape["mean"] == pytest.approx(losses["2"]) and shape["spread"] == pytest.approx(0.02)
    assert any("the largest rate tried is the best of 2x128" in note for note in found["notes"])


def test_orderings_are_those_of_the_law(of_known_law):
    _, _, found, _ = of_known_law
    for equal, order in found["orderings"].items():
        shapes = [shape for shape in found["shapes"] if shape["equal"] == equal]
        by_law = sorted(shapes, key=lambda shape: abs(math.log(shape["d_model_per_layer"] / known.BEST_ASPECT)))
        assert order["best"] == by_law[0]["name"] and len(order["pairs"]) == 7 * 6 // 2
        names = [shape["name"] for shape in by_law]
        at = names.index("8x64")
        assert {*order["below_preset"]} == {*names[:at]} and {*order["above_preset"]} == {*names[at + 1 :]}
        assert order["not_told_apart"] == []


def test_an_ordering_that_a_seed_contradicts_is_not_stated(small, tmp_path):
    def loss(n_layers, d_model, lr, seed):
        return (
            3 + (0.1 if n_layers == 8 and seed != 2 else 0.0) + (0.5 if n_layers > 20 else 0.0) + 0.001 * (lr != 0.01)
        )

    arguments = [*small, *KNOWN, f"depth.dir={tmp_path}", "depth.equal=[params]", "depth.aspects=[1/4,2,1/8]"]
    assert study(arguments, known.Known(loss)) == 0
    order = json.loads((tmp_path / "depth.json").read_text())["orderings"]["params"]
    assert order["not_told_apart"] == ["5x80", "19x40"] and order["above_preset"] == ["32x32"]
    assert sorted(order["pairs"]) == [["19x40", "32x32"], ["5x80", "32x32"], ["8x64", "32x32"]]


def test_one_seed_states_no_ordering_and_a_shape_that_diverges_has_no_loss(small, tmp_path):
    def loss(n_layers, d_model, lr, seed):
        return math.nan if n_layers > 20 else known.loss_of(n_layers, d_model, lr, seed)

    arguments = [*small, *KNOWN, f"depth.dir={tmp_path}", "depth.seeds=[4]"]
    trains = known.Known(loss)
    assert study(arguments, trains) == 0 and all(name.endswith("-s4") for name in trains.trained)
    found = json.loads((tmp_path / "depth.json").read_text())
    assert [order["pairs"] for order in found["orderings"].values()] == [[], []]
    assert [shape["mean"] for shape in found["shapes"] if shape["n_layers"] > 20] == [None, None]
    deep = [run for run in found["runs"] if int(run["model"].split("x")[0]) > 20]
    text = " ".join((tmp_path / "depth.txt").read_text().split())
    assert (
        "one seed: what another would change" in text and f"{len(deep)} of {len(found['runs'])} runs diverged" in text
    )


def test_a_shape_that_diverged_with_some_seeds_is_no_best_one(small, tmp_path):
    def loss(n_layers, d_model, lr, seed):
        if n_layers == 5 and seed != 1:
            return math.nan
        return known.loss_of(n_layers, d_model, lr, seed) - (1 if n_layers == 5 else 0)

    arguments = [*small, *KNOWN, f"depth.dir={tmp_path}", "depth.equal=[params]", "depth.aspects=[2,1/4]"]
    assert study(arguments, known.Known(loss)) == 0
    found = json.loads((tmp_path / "depth.json").read_text())
    assert found["orderings"]["params"]["best"] != "5x80"
    assert any(note.startswith("5x80: without a loss for each seed") for note in found["notes"])
    kaplan = next(claim["here"] for claim in found["claims"] if claim["source"].startswith("Kaplan"))
    assert "from 2.11 to 8, a factor" in kaplan


def test_claims_are_not_judged_without_a_basis(small, tmp_path):
    arguments = [*small, *KNOWN, "depth.aspects=[2]", "depth.seeds=[1]"]
    for name, loss, said in (
        ("one seed", known.loss_of, "at equal params, not judged: one seed"),
        ("none", lambda *_: math.nan, "not judged: too few shapes have a loss for each seed"),
    ):
        assert study([*arguments, f"depth.dir={tmp_path / name}"], known.Known(loss)) == 0
        here = [claim["here"] for claim in json.loads((tmp_path / name / "depth.json").read_text())["claims"]]
        assert any(text.startswith(said) for text in here), here


def test_what_cannot_be_timed_costs_no_result(small, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("[enforce fail] can't allocate memory\nmore of it")

    monkeypatch.setattr(timing, "_train", fails)
    timed = timing.times_of({}, 1, 8, 1, 8, print)
    assert timed.problem.startswith("[enforce fail] can't allocate memory (") and timed.train == {}
    arguments = [*small, *KNOWN, f"depth.dir={tmp_path}", "depth.aspects=[2]"]
    assert command.study(arguments, known.Known(), lambda trainings: [], lambda *_: timed) == 0
    assert "not timed: [enforce fail]" in " ".join((tmp_path / "depth.txt").read_text().split())


def test_text_and_pictures_say_what_was_found(of_known_law):
    _, folder, found, _ = of_known_law
    written = (folder / "depth.txt").read_text()
    assert max(map(len, written.splitlines())) <= 118 and "…" not in written
    text = " ".join(written.split())
    best = found["orderings"]["params"]["best"]
    assert f"at equal params: the least mean loss is that of {best}," in text
    assert "2401.02954" in text and "of 3 deeper shapes" in text
    shown = [f"{one['name']} is {one['cost_off']:+.1%} off the preset's {one['equal']}" in text
             for one in found["shapes"]]  # fmt: skip
    assert shown == [abs(one["cost_off"]) > 0.03 for one in found["shapes"]]
    (deep,) = (model for model in found["models"] if model["name"] == "14x48")
    assert deep["decode_seconds"] == 0.014 and deep["kv_cache_bytes_per_token"] == 2 * 3 * 8 * 2 * 14
    assert deep["pipelines"]["16"] is None and deep["pipelines"]["8"]["bubble"] > deep["pipelines"]["2"]["bubble"]
    for name in ("loss", "decode"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again_and_what_was_stopped_goes_on(of_known_law, small, tmp_path):
    arguments, folder, found, trains = of_known_law
    again = known.Known()
    assert study(arguments, again) == 0 and again.trained == []
    assert json.loads((folder / "depth.json").read_text()) == found
    arguments = [*small, *KNOWN, f"depth.dir={tmp_path}"]
    parts = [known.Known(stop_after=7), known.Known(stop_after=len(trains.trained) - 10), known.Known()]
    for part in parts:
        assert study(arguments, part) == 0
        assert (tmp_path / "depth.json").exists() == (part is parts[2])
    assert [name for part in parts for name in part.trained] == trains.trained


def problems_of(arguments):
    with pytest.raises(BadInput) as error:
        study(arguments, None)
    return error.value.problems


def test_what_cannot_work_is_said_at_once(small, tmp_path):
    arguments = [*small, *KNOWN, f"depth.dir={tmp_path / 'none'}"]
    wrong = ["depth.aspects=[4,x]", "depth.seeds=[]", "depth.lrs=[-1]", "train.seed=3", "depth.pp=[1]", "depth.equl=1"]
    said = problems_of([*arguments, *wrong])
    for key in (
        "depth.aspects: x",
        "depth.seeds=[]",
        "depth.lrs=[-1]",
        "train.seed: is the",
        "depth.pp=[1]",
        "depth.equl",
    ):
        assert [line for line in said if line.startswith(key)], (key, said)
    said = problems_of([*arguments, "depth.aspects=[64,1/4]"])
    assert len(said) == 2 and "64x at equal params" in said[0] and "8x, 4x, 2x, 1x" in said[0]
    (said,) = problems_of([*arguments, "parallel.dp=null"])
    assert said == "parallel.dp=null: each run would take the whole machine; parallel.dp=1 would work"
    assert (
        plan([*arguments, "parallel.tp=2"]).config.parallel.dp == 1
    )  # the layout beside it leaves replicas as they are
    (said,) = problems_of([*arguments, "depth.lrs=[0.01]"])
    assert said.startswith("optimizer.lr: ")
    said = problems_of([*arguments, "parallel.schedule=dualpipev", "depth.micro_batches=4"])
    assert all(line.startswith("depth.micro_batches=4, depth.pp=") for line in said)
    assert not (tmp_path / "none").exists()
    with pytest.raises(BadInput, match="not enough"):
        study(arguments, None, lambda trainings: ["not enough"])
    assert not (tmp_path / "none").exists()


def test_runs_of_another_recipe_are_not_taken_for_these(of_known_law):
    arguments, folder, _, _ = of_known_law
    (said,) = problems_of([*arguments, "optimizer.clip=0.5"])
    assert "optimizer.clip=" in said and "holds runs of another recipe" in said
    # models of as many layers and as wide, and not these
    (said,) = problems_of([*arguments, "model.d_ff=352", "model.n_kv_heads=8"])
    assert "model.d_ff=176" in said and "and 1 more" in said
    run = next((folder / "runs").glob("*-s2")) / "metrics.jsonl"
    kept = run.read_text()
    run.write_text(kept.replace('"step": 50', '"step": 49'))
    assert "has no validation loss after step 50" in problems_of_report(arguments)
    run.write_text(kept)


def problems_of_report(arguments):
    with pytest.raises(BadInput) as error:
        study(arguments, known.Known())
    return error.value.problems[0]


def test_a_plan_prints_shapes_of_a_large_preset_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["depth.aspects=[2,1/2]", "depth.equal=[flops]", "depth.pp=[8]", "model=7b", "data=files", "data.path=/none"]
    assert cli.main(["depth-study", *few, "--plan"]) == 0
    said = capsys.readouterr().out
    assert "19x5120" in said and "45x3328" in said and "6,910,365,696" in said and "pp 8" in said
    assert not list(tmp_path.iterdir())


REAL = [
    *["model.n_layers=4", "model.d_model=32", "model.n_heads=8", "model.n_kv_heads=4", "model.d_ff=88"],
    *["depth.aspects=[8,1,1/8]", "depth.equal=[params]", "depth.lrs=[3e-3]", "depth.seeds=[1]", "depth.pp=[2]"],
    *["train.max_steps=4", "train.val_sequences=4"],
]


@pytest.mark.launch
def test_real_runs_are_stopped_gone_on_with_and_compared(small, tmp_path, capsys):
    kept = [text for text in small if not text.startswith("optimizer.lr")]
    arguments = [*kept, *REAL, f"depth.dir={tmp_path}"]
    stopped = Session(tmp_path, "runs/*", stop_after=1)
    assert command.study(arguments, stopped) == 0
    assert "the same command goes on" in capsys.readouterr().err and not (tmp_path / "depth.json").exists()
    done = {path.name for path in tmp_path.glob("runs/*") if is_complete(path)}
    goes_on = Session(tmp_path)
    assert command.study(arguments, goes_on) == 0
    assert done and not done & {*goes_on.began}
    found = json.loads((tmp_path / "depth.json").read_text())
    assert len(found["runs"]) == 3 == len(done) + len(goes_on.began)
    for run in found["runs"]:
        last = runs.metrics(tmp_path / "runs" / run["name"])[-1]
        assert last["val_loss"] == run["loss"] and (last["step"], last["tokens"]) == (4, found["tokens"])
    seconds = [model["decode_seconds"] for model in found["models"]]
    assert seconds[0] < seconds[-1]  # a sixteenth of the layers
    assert all(model["tokens_per_s"] > 0 for model in found["models"])
    assert {"shapes", "models", "runs", "loss", "decode"} <= logged_keys(tmp_path)
