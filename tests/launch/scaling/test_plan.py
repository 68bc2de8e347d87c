"""What cannot be is said before anything is trained, all of it at once."""

import json

import pytest

from launch.scaling import command
from launch.scaling.findings import epochs_of
from launch.scaling.plan import plan
from model.problems import BadInput
from tests.launch.scaling import known
from train.data.sources import prepare_run


@pytest.fixture
def small(overrides, tmp_path):
    kept = [text for text in overrides if not text.startswith(("model.d_ff", "train.global_batch"))]
    return [*kept, f"scaling.dir={tmp_path / 'none'}", "wandb.mode=disabled"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("scaling.budgets=[1e12,2e12]", "scaling.budgets=[1e+12, 2e+12]: M and tokens are fitted through computes"),
        ("scaling.budgets=[1e12,-2,3e12]", "-2 is not a number above 0"),
        ("scaling.budgets=[1e12,1e12,3e12]", "1e+12 stands there twice; once would work"),
        (
            "scaling.rate_budgets=[1e12]",
            "a power law needs two computes; another one would work, and [] tries no rates",
        ),
        ("scaling.rates=[1e-2]", "a grid needs 2 rates at least"),
        ("scaling.batches=[]", "a grid needs a batch at least"),
        (
            "scaling.batches=[9]",
            "scaling.batches=9: not a multiple of train.micro_batch x parallel.dp = 2 sequences; 8",
        ),
        ("scaling.seeds=[]", "at least one, such as [1]"),
        ("scaling.sizes=2", "scaling.sizes=2: a parabola needs 3; 5 would work"),
        ("scaling.shapes=[1x16,2x16]", "a parabola needs 3; [] derives them"),
        ("scaling.shapes=[1x16,2x17,2x32]", "scaling.shapes=2x17: 17 is no multiple of the 16 of a head"),
        ("scaling.parallel_runs=0", "scaling.parallel_runs=0: must be at least 1, or null"),
        ("scaling.compute=1", "scaling.compute=1: no such key; there are scaling.budgets"),
        ("scaling.rate_budgets=[1e6,1e12]", "scaling.rate_budgets=1e+06: pays for 1 steps of 16 x 32 tokens"),
        ("scaling.budgets=[1e7,1e12,2e12]", "scaling.budgets=1e+07: pays for 1 steps"),
        ("optimizer.lr=1e-3", "optimizer.lr: is what scaling.rates=[…] tries; scaling.rate_budgets=[] tries none"),
        ("train.total_tokens=1e6", "train.total_tokens: is the study's to set; scaling.budgets=[…] says"),
        ("init_from=/elsewhere", "init_from: is the study's to set; every run begins with new weights"),
        ("hydra.run.dir=/elsewhere", "hydra.run.dir: is the study's to set; scaling.dir=… says"),
        ("model.n_heads=5", "model.n_kv_heads=2: does not divide model.n_heads=5"),
        ("data.val_fraction=0", "data.val_fraction=0: a study measures the loss on held-out documents"),
        ("model.nothing=1", "model.nothing=1: no such key"),
        ("parallel.dp=null", "parallel.dp=null: each run would take the whole machine; parallel.dp=1 would work"),
    ],
)
def test_what_cannot_be_is_said(wrong, said, small, tmp_path):
    trains = known.Known()
    with pytest.raises(BadInput) as error:
        command.study([*small, wrong], trains)
    assert any(said in problem for problem in error.value.problems), error.value.problems
    assert trains.trained == [] and not (tmp_path / "none").exists()


def test_several_mistakes_are_said_together(small):
    with pytest.raises(BadInput) as error:
        plan([*small, "scaling.sizes=1", "scaling.budgets=[1]", "name=mine", "scaling.size=3"])
    keys = [problem.partition("=")[0].partition(":")[0] for problem in error.value.problems]
    assert keys == ["scaling.size", "scaling.budgets", "scaling.sizes", "name"]


def test_problems_of_every_run_are_found_before_the_first(small, tmp_path):
    trains = known.Known()
    with pytest.raises(BadInput) as error:
        few = ["scaling.rates=[1e-2,2e-2]", "scaling.batches=[32]", "scaling.shapes=[1x16,2x16,2x32]"]
        command.study([*small, *few, "optimizer.beta1=2", "parallel.pp=2"], trains)
    problems = error.value.problems
    assert any("optimizer.beta1" in text for text in problems), problems
    # models of one layer are among the IsoFLOP runs alone, whose rate the grid has still to find
    assert any("parallel.pp=2: more stages than the 1 layers" in text for text in problems), problems
    assert trains.trained == []


def test_runs_of_another_recipe_are_not_taken_for_these(small, tmp_path):
    plan(small).keep_recipe()
    assert plan([*small, "scaling.sizes=6", "train.log_every=7"]).folder == tmp_path / "none"
    with pytest.raises(BadInput, match=r"holds runs of another recipe \(optimizer.weight_decay=0.1 there, 0.0 here\)"):
        plan([*small, "optimizer.weight_decay=0.0"])
    for other in ("train.val_sequences=8", "train.precision=bf16"):  # the losses would not be of one measure
        with pytest.raises(BadInput, match=rf"holds runs of another recipe \({other.partition('=')[0]}=\w+ there"):
            plan([*small, other])


def test_what_an_older_folder_does_not_say_of_its_recipe_counts_as_the_same(small, tmp_path):
    plan(small).keep_recipe()
    path = tmp_path / "none" / "recipe.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({key: kept[key] for key in kept.keys() - {"train.val_sequences", "train.precision"}}))
    assert plan([*small, "train.val_sequences=8"]).folder == tmp_path / "none"


def test_what_is_planned_by_default_can_be_trained(tmp_path):
    study = plan([f"scaling.dir={tmp_path}/none"])
    assert len(study.grid()) == 30 and len(study.isoflop(None)) == 20
    assert not any(one.global_batch % study.unit for one in study.grid())


def test_without_a_grid_every_run_has_the_rate_and_batch_that_are_given(small):
    without = [*small, "scaling.rate_budgets=[]", "optimizer.lr=2e-3", "train.global_batch=12"]
    study = plan(without)
    assert study.grid() == [] and {(one.lr, one.global_batch) for one in study.isoflop(None)} == {(2e-3, 12)}
    with pytest.raises(BadInput, match=r"train.global_batch=0:8 100:16: grows; one number of sequences would work"):
        plan([*without, 'train.global_batch="0:8 100:16"'])


def test_a_run_is_configured_by_its_setting(small):
    study = plan([*small, "scaling.seeds=[3,4]"])
    isoflop = study.isoflop(None)
    assert len(isoflop) == 4 * 5 * 2 and len({one.name for one in isoflop}) == len(isoflop)
    one = isoflop[-1]
    own = dict(text.split("=", 1) for text in study.training(one).overrides)
    assert own["train.seed"] == "4" and int(own["train.total_tokens"]) == one.tokens == one.steps * 16 * 32
    assert own["schedule.warmup_steps"] == "100" and own["parallel.dp"] == "1" and own["train.val_every"] == "0"
    short = study._setting("isoflop", 50 * one.m * 1024.0, one.shape, 1e-2, 32, 3)
    assert "schedule.warmup_steps=5" in study.training(short).overrides and short.steps == 50
    assert study.training(one).run_dir == study.folder / "isoflop" / one.name


def test_a_run_has_one_replica_unless_another_number_is_given(small):
    assert plan([*small, "parallel.tp=2"]).config.parallel.dp == 1  # the layout beside it leaves replicas as they are
    assert plan([*small, "parallel.dp=2", "scaling.batches=[8]"]).config.parallel.dp == 2


def test_epochs_of_weighted_sources_are_those_of_the_one_that_is_repeated_most(small, corpus):
    sources = f"data.sources={{a: {{path: '{corpus}/a*.py'}}, b: {{path: '{corpus}/b*.py', weight: 9}}}}"
    config = plan([*[text for text in small if not text.startswith("data.path")], sources]).config
    data = prepare_run(config, progress=False)
    tokens = {name: own.num_train_tokens for name, own in data.by_name.items()}
    trained = 32 * 32 * 100
    of_each = {"a": 0.1 * trained / tokens["a"], "b": 0.9 * trained / tokens["b"]}
    found = epochs_of(config, trained, 32, data)
    assert found == pytest.approx(max(of_each.values()), rel=0.05)
    assert abs(found / (trained / sum(tokens.values())) - 1) > 0.2  # of all tokens together it is another number
    alone = plan(small).config
    one = prepare_run(alone, progress=False)
    assert epochs_of(alone, trained, 32, one) == pytest.approx(trained / one.num_train_tokens)
