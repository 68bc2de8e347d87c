"""What `init_from` and `uptrain` stand for, as overrides before the command's own."""

from dataclasses import asdict
from pathlib import Path

import pytest

from conf.compose import compose_overrides
from conf.schema import to_jsonable
from model.problems import BadInput
from model.weights import StoredWeights
from tests.shapes import preset
from train.checkpoint.manifest import Manifest
from train.pretrained import Source
from train.uptrain import implied, problems, warnings

# 2000 steps of 8 x 256 tokens, all of them taken
ORIGINAL = ["model=tiny", "model.n_layers=6", "train.total_tokens=4096000", "schedule.warmup_steps=100", "data=files"]
ORIGINAL += ["data.path='/corpus/it''s here/*.txt'".replace("''", "\\'"), "optimizer.lr=0.002"]


def source(*changes, tokens=4_096_000, tokenizer=Path("/weights/tokenizer.json")):
    config = preset(*ORIGINAL, *changes)
    nothing = dict(code="", written="", origin=None, tensors={}, files={}, layout={}, data="")
    run = Manifest(step=0, adam_step=0, tokens=tokens, config=to_jsonable(asdict(config)), **nothing)
    return Source(Path("/weights"), StoredWeights(config.model, Path("/weights"), {}), tokenizer, run)


def composed(source, *overrides):
    overrides = ["init_from=/weights", *overrides]
    found = implied(preset("model=tiny", *overrides), source, overrides)
    composition = compose_overrides([*found, *overrides])
    assert not composition.problems
    return composition.config


def test_an_uptraining_has_the_recipe_of_its_weights_for_a_share_of_their_tokens():
    then, now = preset(*ORIGINAL), composed(source(), "uptrain.alpha=0.05")
    assert now.model == then.model and now.data == then.data
    assert now.data.path == "/corpus/it's here/*.txt"
    assert now.train.total_tokens == pytest.approx(0.05 * 4_096_000) and now.train.skip_samples == 2000 * 8
    assert (now.train.global_batch, now.train.seq_len) == (8, 256)
    assert now.schedule.warmup_steps == 5
    # multi-step ends at a tenth of the peak
    assert now.optimizer.lr == pytest.approx(0.0002) and now.schedule.decay_share == 0


@pytest.mark.parametrize(
    ("changes", "tokens", "rate"),
    [
        (["schedule=cosine"], 4_096_000, 0.0002),
        (["schedule=wsd"], 4_096_000, 0.002 * (0.1 + 0.9 / 400)),  # before the last of 400 falling steps
        ([], 4_096_000 // 2, 0.002),  # stopped at its half
        ([], 4_096_000 * 17 // 20, 0.002 * 0.316),
        (["train.max_steps=50"], 50 * 2048, 0.001),  # stopped in its warm-up
    ],
)
def test_the_rate_is_held_where_theirs_stood(changes, tokens, rate):
    now = composed(source(*changes, tokens=tokens), "uptrain.alpha=0.1")
    assert now.optimizer.lr == pytest.approx(rate, rel=2e-3)
    assert now.train.total_tokens == pytest.approx(0.1 * tokens)


def test_again_runs_the_original_schedule_over_the_shorter_length():
    now = composed(source(), "uptrain.alpha=0.1", "uptrain.rate=again")
    assert now.optimizer.lr == 0.002 and now.schedule.warmup_steps == 10
    assert now.schedule.decay.name == "multi_step" and now.schedule.step_to == [0.316, 0.1]


@pytest.mark.parametrize("then", [True, False, None], ids=["apart", "together", "older than the key"])
def test_documents_see_each_other_if_they_did_whatever_the_corpus(then):
    original = source()
    if then is None:
        del original.run.config["data"]["document_mask"]
    else:
        original.run.config["data"]["document_mask"] = then
    for corpus in ([], ["data=stdlib"]):
        assert composed(original, "uptrain.alpha=0.1", *corpus).data.document_mask is bool(then)
    assert composed(original, "uptrain.alpha=0.1", "data.document_mask=true").data.document_mask is True


def test_whatever_the_command_sets_wins():
    now = composed(source(), "uptrain.alpha=0.1", "optimizer.lr=0.5", "train.total_tokens=7e5", "schedule=cosine")
    assert now.optimizer.lr == 0.5 and now.train.total_tokens == 7e5
    assert now.schedule.decay.name == "cosine" and now.schedule.warmup_steps == preset("tiny").schedule.warmup_steps
    other = composed(source(), "uptrain.alpha=0.1", "data=stdlib")
    assert other.data.source.name == "stdlib" and other.data.path is None
    assert other.data.tokenizer == "/weights/tokenizer.json"


def test_without_a_share_the_weights_give_shape_and_tokenizer_and_the_command_the_recipe():
    now = composed(source(), "train.total_tokens=9e5", "model=7b")
    assert now.model.n_layers == 6 and now.model.d_model == 128
    assert now.optimizer.lr == preset("7b").optimizer.lr and now.train.skip_samples == 0
    assert now.data.tokenizer == "/weights/tokenizer.json"
    assert composed(source(tokenizer=None)).data.tokenizer is None
    slides = source("model.window=64", "model.window_pattern=ffsss")
    assert composed(slides).model.windows == slides.weights.config.windows == (None, None, 64, 64, 64, None)
    assert composed(slides, "model.window=32").model.window == 32  # as a context, it may become another


def test_another_shape_and_a_share_of_nothing_are_problems():
    config = composed(source(), "model.n_kv_heads=4", "model.d_ff=99", "uptrain.alpha=0.1")
    found = problems(config, source())
    assert [line.partition("=")[0] for line in found] == ["model.n_kv_heads", "model.d_ff"]
    assert "deepnarrow regroup makes weights that have 4" in found[0]
    assert problems(preset("tiny", "uptrain.alpha=-1"), source("model.n_layers=8"))[0].startswith(
        "uptrain.alpha=-1.0: must"
    )
    nobody = Source(Path("/hf"), source().weights, None, None)
    with pytest.raises(BadInput, match="does not say what recipe made it"):
        composed(nobody, "uptrain.alpha=0.1")


MIXTURE = ["data=stdlib", "data.path=null", "data.sources={web: {path: '/we b', weight: 3}, code: {name: a/b}}"]
STAGES = "data.stages=[{until: 1e6}, {until: 1e13, weights: {code: 1}, seq_len: 128}]"


def test_a_mixture_is_taken_over_and_goes_on_with_the_batch_that_it_ended_with():
    now = composed(source(*MIXTURE, "train.global_batch='0:8 1e6:16'"), "uptrain.alpha=0.05")
    assert {name: (one.path, one.name, one.weight) for name, one in now.data.sources.items()} == {
        "web": ("/we b", None, 3.0),
        "code": (None, "a/b", 1.0),
    }
    assert (now.train.global_batch, now.train.seq_len, now.data.stages) == (16, 256, [])
    assert now.train.skip_samples == 4_096_000 // 256
    assert now.optimizer.lr == pytest.approx(0.0002)
    halfway = composed(source(*MIXTURE, "train.global_batch='0:8 1e6:16'", tokens=500_000), "uptrain.alpha=0.05")
    assert halfway.train.global_batch == 8


def test_a_place_in_the_data_that_is_not_exact_is_said():
    one, several = source(*MIXTURE, "train.global_batch='0:8 1e6:16'"), source(*MIXTURE, STAGES)
    assert warnings(composed(one, "uptrain.alpha=0.05"), one) == warnings(preset("tiny"), None) == []
    (line,) = warnings(composed(several, "uptrain.alpha=0.05"), several)
    assert line.startswith("train.skip_samples=32000: the run that made the weights had several data stages")


def test_the_last_stage_of_a_run_is_the_only_one_of_its_uptraining():
    now = composed(source(*MIXTURE, STAGES), "uptrain.alpha=0.05")
    assert {name: one.weight for name, one in now.data.sources.items()} == {"web": 0.0, "code": 1.0}
    assert (now.data.stages, now.train.seq_len, now.train.skip_samples) == ([], 128, 4_096_000 // 128)
    # A command may set a key of a source that it does not name itself.
    own = ["init_from=/weights", "uptrain.alpha=0.05", "data.sources.web.weight=5"]
    found = implied(preset("model=tiny", *own[:2]), source(*MIXTURE, STAGES, tokens=900_000), own)
    first = compose_overrides([*found, *own]).config
    assert {name: one.weight for name, one in first.data.sources.items()} == {"web": 5.0, "code": 1.0}
    assert (first.data.stages, first.train.seq_len) == ([], 256)
