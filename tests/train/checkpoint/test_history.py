"""A run that is resumed with other batches, lengths or sources goes on from what it has really trained on."""

from dataclasses import asdict

import pytest

from conf.schema import to_jsonable
from tests.shapes import preset
from train.checkpoint import history
from train.checkpoint.manifest import Manifest
from train.checkpoint.resume import warnings
from train.data.mixed_order import MixedOrder
from train.length import Consumed, Steps, length_of

ONE = ["data=files", "data.path=/web"]
TWO = ["data.sources={web: {path: /web, weight: 3}, code: {path: /code, weight: 1}}"]
PRINTS = {"web": "aa", "code": "bb"}


def run(*overrides, past=None, prints=PRINTS):
    """The settings, length and order of a run that goes on from a checkpoint."""
    config = preset("tiny", "train.seq_len=128", "train.total_tokens=1e6", *overrides)
    begun = history.begun(config, past, prints)
    length = length_of(config, begun)
    return config, begun, length, MixedOrder.of(config, length, begun)


def saved(step, *overrides, past=None, prints=PRINTS, kept=True):
    """The checkpoint of a run's step; one from before histories were kept, if not `kept`."""
    config, begun, length, order = run(*overrides, past=past, prints=prints)
    return Manifest(
        step=step,
        adam_step=step,
        tokens=length.tokens_after(step),
        data="aa",
        config=to_jsonable(asdict(config)),
        layout={},
        code="",
        written="",
        origin=None,
        tensors={},
        files={},
        history=history.as_json(begun, order.consumed(length, step), prints) if kept else None,
    )


def samples(found, step):
    """The samples of a step, as source and place in its order."""
    _, _, length, order = found
    size = length.at(step)
    seq_len, names, places = order.take(range(size.samples_before, size.samples_before + size.global_batch))
    assert seq_len == size.seq_len
    return [*zip(names, places.tolist(), strict=True)]


def seen(found, steps):
    return [sample for step in steps for sample in samples(found, step)]


# Checkpoints without a history are of one corpus and one batch.
@pytest.mark.parametrize(
    ("data", "kept"), [(ONE, True), (ONE, False), (TWO, True), ([*TWO, "train.global_batch='0:8 4e3:16'"], True)]
)
def test_with_the_same_settings_nothing_is_otherwise(data, kept):
    prints = PRINTS if data is not ONE else {"files": "aa"}
    whole = run(*data, prints=prints)
    again = run(*data, "train.total_tokens=2e6", past=saved(5, *data, prints=prints, kept=kept), prints=prints)
    assert seen(whole, range(1, 20)) == seen(again, range(1, 20)) and again[1] == Consumed()
    assert whole[2].at(19) == again[2].at(19)


@pytest.mark.parametrize("kept", [True, False])
def test_another_batch_goes_on_with_the_next_sample_and_token(kept):
    past = saved(5, *ONE, prints={"files": "aa"}, kept=kept)
    _, begun, length, order = found = run(*ONE, "train.global_batch='0:8 6e3:12'", past=past, prints={"files": "aa"})
    assert (begun.step, begun.samples, begun.tokens) == (5, 40, 5120)
    assert seen(found, range(6, 9)) == [("files", place) for place in range(40, 40 + 8 + 12 + 12)]
    assert (length.at(6).tokens_before, length.at(8).tokens_before) == (5120, 5120 + 1024 + 1536)
    assert order.source_tokens(length.samples_after(8)) == {"files": length.tokens_after(8)}


def test_every_further_change_goes_on_from_what_was_seen():
    first = saved(4, *TWO)  # 32 samples, 24 of them of web
    second = saved(7, *TWO, "train.global_batch=4", past=first)  # 12 more, 9 of them
    found = run(*TWO, "train.global_batch=4", "data.sources.web.weight=1", past=second)
    _, begun, length, order = found
    assert begun.positions == {128: {"web": 33, "code": 11}} and begun.steps == (Steps(4, 8, 128), Steps(3, 4, 128))
    assert sorted(samples(found, 8)) == [("code", 11), ("code", 12), ("web", 33), ("web", 34)]
    assert length.at(8).tokens_before == 44 * 128
    third = saved(8, *TWO, "train.global_batch=4", "data.sources.web.weight=1", past=second)
    unchanged = run(*TWO, "train.global_batch=4", "data.sources.web.weight=1", past=third)
    assert seen(unchanged, range(8, 12)) == seen(found, range(8, 12)) and unchanged[1] == begun
    assert sum(order.source_tokens(length.samples_after(9)).values()) == length.tokens_after(9)


def test_a_source_is_known_by_its_documents_then_by_its_name():
    past = saved(4, *TWO)
    renamed = ["data.sources={pages: {path: /web}, code: {path: /other}, books: {path: /books}}"]
    found = run(*renamed, past=past, prints={"pages": "aa", "code": "cc", "books": "dd"})
    assert found[1].positions == {128: {"pages": 24, "code": 8}}
    # One that is left out for a while goes on where it was.
    without = saved(6, *ONE, past=past, prints={"files": "aa"})
    assert without.history["now"]["positions"] == {"128": {"files": 40, "code": 8}}
    assert run(*TWO, past=without)[1].positions == {128: {"web": 40, "code": 8}}
    # A corpus that becomes one of several goes on where it stood; the only one goes on whatever it is called.
    alone = saved(4, *ONE, prints={"files": "aa"})
    assert run(*TWO, past=alone)[1].positions == {128: {"web": 32}}
    hub = run("data=hub", "data.name=a/b", past=alone, prints={"hub": "ee"})
    assert hub[1].positions == {128: {"hub": 32}}


def test_sequences_of_another_length_begin_anew_and_go_on_when_their_length_comes_back():
    stages = "data.stages=[{until: 2e3}, {until: 4e3, seq_len: 64}, {until: 1e13}]"
    whole = run(*TWO, stages)
    assert [whole[2].at(step).seq_len for step in range(1, 8)] == [128, 128, 64, 64, 64, 64, 128]
    assert seen(whole, [1, 2]) + seen(whole, [7]) == seen(run(*TWO), [1, 2, 3])
    assert seen(whole, [3, 4, 5, 6]) == seen(run(*TWO), [1, 2, 3, 4])
    # Resumed in the middle of a stage, with another length from there on.
    past = saved(4, *TWO, stages)
    shorter = run(*TWO, "train.seq_len=64", past=past)
    assert shorter[1].positions == {128: {"web": 12, "code": 4}, 64: {"web": 12, "code": 4}}
    assert seen(shorter, [5]) == seen(whole, [5])


def test_a_border_of_stages_that_is_moved_changes_nothing_that_was():
    def stages(until):
        return f"data.stages=[{{until: {until}}}, {{until: 1e13, weights: {{code: 1}}}}]"

    past = saved(4, *TWO, stages("2e3"))  # two steps of each stage
    moved = run(*TWO, stages("6e3"), past=past)
    assert moved[1].positions == {128: {"web": 12, "code": 20}}
    assert sorted(seen(moved, [5])[:4]) == [("code", 20), ("web", 12), ("web", 13), ("web", 14)]
    assert {name for name, _ in samples(moved, 7)} == {"code"}
    longer = f"{stages('2e3')[:-1]}, {{until: 2e13}}]"  # what comes later changes nothing that is under way
    assert seen(run(*TWO, longer, past=past), [5]) == seen(run(*TWO, stages("2e3")), [5])


def test_samples_that_are_passed_over_are_so_once():
    one = ["data=files", "data.path=/web", "train.skip_samples=100"]
    prints = {"files": "aa"}
    assert seen(run(*one, prints=prints), [1]) == [("files", 100 + place) for place in range(8)]
    past = saved(2, *one, prints=prints)
    assert seen(run(*one, past=past, prints=prints), [3]) == [("files", 116 + place) for place in range(8)]
    on = [*one[:2], "train.skip_samples=150"]
    found = run(*on, past=past, prints=prints)
    assert seen(found, [3]) == [("files", 166 + place) for place in range(8)]
    assert found[3].source_tokens(found[2].samples_after(3)) == {"files": 24 * 128}
    assert seen(run(*on, past=saved(3, *on, past=past, prints=prints), prints=prints), [4])[0] == ("files", 174)
    staged = run(*one, "data.stages=[{until: 2e3}, {until: 4e3}, {until: 1e13}]", prints=prints)
    assert seen(staged, range(1, 6)) == [("files", 100 + place) for place in range(40)]
    (problem,) = history.problems(preset("tiny", *ONE, "train.skip_samples=99"), past)
    assert problem.startswith("train.skip_samples=99: the run has passed over 100 samples already; ")


def test_what_has_changed_is_said_with_where_each_source_goes_on():
    past = saved(4, *TWO)
    config, begun, *_ = run("data.sources={web: {path: /web}, books: {path: /b}}", past=past, prints={"web": "aa"})
    (line,) = history.said(config, past, begun)
    assert line == (
        "batches, lengths or mixture are others than up to step 4: the run goes on from the 32 samples and 4,096 "
        "tokens that it has trained on, web at sequence 24 of 128 tokens, books at its beginning"
    )
    assert any(line.startswith("data.sources={") and "the run had {" in line for line in warnings(config, past, "aa"))
    gone = preset("tiny", *ONE, "train.seq_len=128")
    assert any(line.startswith("data.sources={}: the run had {") for line in warnings(gone, past, "aa"))
    same = run(*TWO, "optimizer.lr=1", past=past)
    assert history.said(same[0], past, same[1]) == []
