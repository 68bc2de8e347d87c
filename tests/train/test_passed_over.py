"""Steps and samples that a run passes over on purpose: exact in the order of samples, true in its checkpoints."""

from dataclasses import replace

import pytest

from conf.ranges import ranges_of
from tests.train.checkpoint.test_history import ONE, TWO, run, samples, saved, seen
from train import passed_over
from train.checkpoint import history

STAGES = "data.stages=[{until: 4e3}, {until: 1e13, weights: {code: 1, web: 1}}]"
PASSED = "train.skip_samples_at=[10-13,29-40]"


def places(found, steps):
    """The places of the samples of some steps in the order of the run."""
    length, order = found[2], found[3]
    sizes = [length.at(step) for step in steps]
    return [place for s in sizes for place in order.places(range(s.samples_before, s.samples_before + 8)).tolist()]


@pytest.mark.parametrize("data", [ONE, TWO])
def test_the_samples_behind_move_up_and_no_other_is_lost_or_repeated(data):
    whole, found = run(*data), run(*data, PASSED)
    kept = [place for place in range(80) if not (10 <= place <= 13 or 29 <= place <= 40)]
    assert places(found, range(1, 9)) == kept[:64]
    of_all = seen(whole, range(1, 11))
    assert seen(found, range(1, 9)) == [of_all[place] for place in kept[:64]]


def test_a_stage_begins_with_the_place_behind_those_before_it():
    """The first stage ends after four steps of eight, in the middle of what is passed over."""
    found, whole = run(*TWO, STAGES, PASSED), run(*TWO, STAGES)
    assert found[2].at(5).stage == 1 and places(found, [4]) == [28, *range(41, 48)]
    later = seen(found, [5, 6])
    assert later[:2] == [("code", 12), ("web", 36)] or later[:2] == [("web", 36), ("code", 12)]
    assert [name for name, _ in later] == [name for name, _ in seen(whole, [5, 6])]
    assert len(set(seen(found, range(1, 20)))) == 19 * 8


def test_tokens_of_sources_are_those_trained_on_and_what_is_passed_over_is_said_by_source():
    _, _, length, order = found = run(*TWO, PASSED)
    trained = seen(found, range(1, 9))
    tokens = {name: 128 * sum(one == name for one, _ in trained) for name in ("web", "code")}
    assert order.source_tokens(64) == tokens and sum(tokens.values()) == 64 * 128
    short = replace(length, steps=8)
    config = run(*TWO, "train.skip_samples_at=[10-13,29-40,2000-3000]")[0]
    lines = passed_over.announced(config, run(*TWO, "train.skip_samples_at=[10-13,29-40,2000-3000]")[3], short)
    missing = [one for one in seen(run(*TWO), [2]) if one not in trained]
    web = [place for name, place in missing if name == "web"]
    assert lines[0].startswith("train.skip_samples_at: samples 10 to 13 are passed over: ")
    assert f"{len(web)} of web, {web[0]} to {web[-1]} of its order" in lines[0]
    assert lines[1].startswith("train.skip_samples_at: samples 29 to 40 are passed over: ")
    assert lines[2:] == ["train.skip_samples_at=[2000-3000]: never reached before the run ends"]


@pytest.mark.parametrize("step", range(1, 7))
@pytest.mark.parametrize("data", [ONE, TWO, [*TWO, STAGES]])
def test_a_run_goes_on_from_any_step_as_the_uninterrupted_one(data, step):
    whole = run(*data, PASSED)
    past = saved(step, *data, PASSED)
    again = run(*data, PASSED, past=past)
    assert seen(again, range(1, 12)) == seen(whole, range(1, 12))
    assert again[3].consumed(again[2], 9) == whole[3].consumed(whole[2], 9)


@pytest.mark.parametrize("step", range(1, 7))
def test_a_run_that_changes_its_batch_goes_on_at_the_next_place(step):
    past = saved(step, *ONE, PASSED, prints={"files": "aa"})
    found = run(*ONE, PASSED, "train.global_batch=4", past=past, prints={"files": "aa"})
    whole = run(*ONE, PASSED)
    before, after = seen(whole, range(1, step + 1)), seen(found, range(step + 1, step + 12))
    assert [*before, *after] == seen(whole, range(1, 14))[: 8 * step + 44]
    assert found[1].place == found[1].samples + found[1].passed == places(whole, [step])[-1] + 1


def test_what_was_trained_on_cannot_be_passed_over_and_what_was_passed_over_stays():
    past, early, late = saved(5, *ONE), saved(2, *ONE), saved(4, *ONE)
    asked = run(*ONE, "train.skip_samples_at=[24-31]")[0]
    (line,) = history.problems(asked, past, iter([("step-4", late), ("step-2", early)]))
    assert line == (
        "train.skip_samples_at=[24-31]: the checkpoint of step 5 has trained on samples 24-31; resume=step-2 goes back "
        "before that, or train.skip_samples_at=[] to go on with what they did"
    )
    assert history.problems(asked, early) == []
    both = run(*ONE, "train.skip_samples_at=[24-31]", "train.skip_steps=[2,5]")[0]
    oldest = saved(1, *ONE)
    lines = history.problems(both, past, iter([("step-4", late), ("step-2", early), ("step-1", oldest)]))
    assert len(lines) == 2 and all("resume=step-1 goes back before that" in line for line in lines)
    unkept = replace(early, history=None)  # as checkpoints of before are: it has trained on samples all the same
    (line,) = history.problems(run(*ONE, "train.skip_samples_at=[3]")[0], past, iter([("step-2", unkept)]))
    assert "resume=never would start again" in line
    (line,) = history.problems(run(*ONE, "train.skip_steps=[3,5-6]")[0], past)
    assert line.startswith("train.skip_steps=[3,5-6]: the checkpoint of step 5 has trained on steps 3,5; resume=never ")
    assert line.endswith("or train.skip_steps=[6] to go on with what they did")
    went = saved(5, *ONE, PASSED, "train.skip_steps=[3]")
    (line,) = history.problems(run(*ONE, "train.skip_samples_at=[29-40,70]")[0], went)
    assert line.startswith("train.skip_samples_at=[29-40,70]: the run has passed over samples 10-13 by step 5, ")
    assert line.endswith("train.skip_samples_at=[10-13,29-40,70] would work")
    assert history.problems(run(*ONE, PASSED[:-1] + ",70]", "train.skip_steps=[3,9]")[0], went) == []


def test_the_last_step_is_taken_and_steps_beyond_it_are_warned_of():
    config, _, length, _ = run(*ONE, "train.skip_steps=[3,7-12]", "train.max_steps=8")
    (line,) = passed_over.last_step_problems(config, length)
    assert line.startswith("train.skip_steps=[3,7-12]: step 8 is the last of the run") and "max_steps=6 would" in line
    config, _, length, _ = run(*ONE, "train.skip_steps=[3,9-12]", "train.max_steps=8")
    assert passed_over.last_step_problems(config, length) == []
    assert passed_over.warnings(config, length) == ["train.skip_steps=[9-12]: never reached, the run ends with step 8"]


def test_batches_of_steps_that_are_passed_over_are_not_read():
    from train.data.batches import train_micro_batches

    read = []

    class Samples:
        def locate(self, numbers):
            read.extend(int(number) for number in numbers)
            raise StopIteration

    found = run(*ONE)
    steps = frozenset(step for one in ranges_of(["1-2"]) for step in one)
    with pytest.raises(RuntimeError):
        next(train_micro_batches(Samples(), found[2].at, micro_batch=2, dp_rank=0, dp_size=1, passed_over=steps))
    assert read == [16, 17] == [place for _, place in samples(found, 3)][:2]
