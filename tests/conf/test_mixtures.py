"""Mixtures, stages and ramp-ups that cannot work: one sentence each, with the key and what would work."""

import pytest

from conf.compose import compose_overrides
from conf.ramp import Rung, rungs
from conf.train_settings import Source, corpora
from conf.validate import Machine, validate, warnings
from tests.shapes import preset

CPU = Machine(gpus=0)
WEB_AND_CODE = "data.sources={web: {path: /web, weight: 0.7}, code: {path: /code, weight: 0.3}}"


def problems(*overrides):
    return validate(preset("tiny", *overrides), CPU)[1]


def sources(web="", code=""):
    return f"data.sources={{web: {{path: /web{web}}}, code: {{path: /code{code}}}}}"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([sources(", weight: -1")], ["data.sources.web.weight=-1.0", "at least 0, such as 0.7"]),
        ([sources(", weight: nan")], ["data.sources.web.weight=nan", "finite"]),
        ([sources(", weight: inf")], ["data.sources.web.weight=inf", "finite"]),
        ([sources(", weight: 0", ", weight: 0")], ["data.sources.web.weight=0", "a weight above 0"]),
        ([sources(", max_epochs: 0")], ["data.sources.web.max_epochs=0.0", "or null"]),
        ([sources(", name: a/b")], ["data.sources.web: has a path and a name", "data.sources.web.source=hub"]),
        (["data.sources={a b: {path: /a}}"], ["data.sources.a b: a name of letters, digits, _ and - would work"]),
        ([WEB_AND_CODE, "data.path=/c"], ["data.path=/c: stands beside data.sources", "data.sources.web.path=/c"]),
        ([WEB_AND_CODE, "data.text_field=body"], ["data.text_field=body", "data.sources.web.text_field=body"]),
        (
            [WEB_AND_CODE, "data.stages=[{until: 1e13, weights: {cod: 1}}]"],
            ["data.stages[0].weights.cod=1: no such source; did you mean code? There are web, code"],
        ),
        (
            [WEB_AND_CODE, "data.stages=[{until: 1e13, weights: {code: -1}}]"],
            ["data.stages[0].weights.code=-1.0: must be a finite number"],
        ),
        (
            [WEB_AND_CODE, "data.stages=[{until: 1e13, weights: {code: 0}}]"],
            ["data.stages[0].weights", "no source has a weight above 0", "data.stages[0].weights.web=1"],
        ),
        (["data.stages=[{until: 1e13, weights: {code: 1}}]"], ["data.stages[0].weights", "no data.sources to weigh"]),
        (
            ["data.stages=[{until: 2e6}, {until: 1e6}, {until: 1e13}]"],
            ["data.stages[1].until=1e+06", "above the 2e+06 at which the stage before ends"],
        ),
        (["data.stages=[{until: 0}]"], ["data.stages[0].until=0", "above 0"]),
        (["data.stages=[{until: nan}]"], ["data.stages[0].until=nan", "finite"]),
        (
            ["data.stages=[{until: 10}, {until: 1e5}]", "train.total_tokens=3e5"],
            ["data.stages[1].until=100000: the stages end before train.total_tokens=300000", "=300000 or one more"],
        ),
        (["data.stages=[{until: 1e13, seq_len: 512}]"], ["data.stages[0].seq_len=512", "model.max_seq_len=256"]),
        (["data.stages=[{until: 1e13, seq_len: 0}]"], ["data.stages[0].seq_len=0", "at least 1"]),
        (
            ["data.stages=[{until: 1e13, seq_len: 33}]", "parallel.tp=2"],
            ["data.stages[0].seq_len=33", "data.stages[0].seq_len=32 or data.stages[0].seq_len=34", "parallel.tp=2"],
        ),
        (["train.global_batch='8:8'"], ["train.global_batch=8:8: begins at 8 tokens", '"0:768 250e9:1536" would work']),
        (["train.global_batch='0:8 9'"], ["9 is no pair of tokens and a batch", "would work"]),
        (["train.global_batch='0:8 5e3:2.5'"], ["a batch of 2.5 is no whole number", "would work"]),
        (["train.global_batch='0:8 5e3:'"], ["a batch of nothing is no whole number", "would work"]),
        (["train.global_batch='0:8 many:16'"], ["many is no number of tokens", "would work"]),
        (["train.global_batch='0:8 nan:16'"], ["nan is no number of tokens", "would work"]),
        (["train.global_batch='0:8 -5:16'"], ["-5 is no number of tokens", "would work"]),
        (["train.global_batch='0:8 5e3:16 4e3:8'"], ["4,000 tokens stand after 5,000", "order"]),
        (["train.global_batch='0:8 5e3:0'"], ["train.global_batch=0:8 5e3:0: must be at least 1"]),
        (["train.global_batch=0"], ["train.global_batch=0: must be at least 1"]),
        (["train.global_batch=eight"], ["train.global_batch=eight", "would work"]),
        (
            ["train.global_batch='0:8 5e3:9'", "parallel.dp=2"],
            ["its batch from 5,000 tokens on, 9, is not divisible", "1 x 2 = 2", "a batch of 8 or 10 would be"],
        ),
        (
            ["train.global_batch='0:8 5e3:10'", "parallel.pp=4", "parallel.schedule=interleaved"],
            ["train.global_batch=10: makes 10 micro-batches", "train.global_batch=8 or train.global_batch=12"],
        ),
    ],
)
def test_each_names_key_value_and_what_would_work(overrides, said):
    (found,) = problems(*overrides)
    assert all(part in found for part in said), found
    assert "\n" not in found


def test_they_come_all_at_once():
    stages = "data.stages=[{until: 5, weights: {cod: 1, web: -1}}, {until: 3, seq_len: 999}]"
    found = problems(WEB_AND_CODE, "data.path=/c", stages, "train.global_batch='0:8 7'")
    assert len(found) == 6


@pytest.mark.parametrize(
    "override",
    ["data.sources={web: {path: /w, wait: 1}}", "data.sources={web: {weight: much}}", "data.stages=[{till: 5}]"],
)
def test_what_is_no_key_or_no_number_is_a_problem_of_the_override(override):
    (found,) = compose_overrides(["model=tiny", override]).problems
    assert found.startswith(override) and ("key" in found or "number" in found)


def test_a_source_that_is_not_there_yet_is_made_by_a_dictionary():
    asked = ["data.sources.web.path=/w", "data.sources.code={path: /c}"]
    found = compose_overrides(["model=tiny", *asked]).problems
    assert [problem.partition(": there is no source ")[0] for problem in found] == asked
    works = [problem.split("; ")[1].removesuffix(" would make it") for problem in found]
    assert works == ["data.sources={web: {path: /w}}", "data.sources={code: {path: /c}}"]
    sources = preset("tiny", *works).data.sources
    assert {name: source.path for name, source in sources.items()} == {"web": "/w", "code": "/c"}


def test_a_source_that_is_there_takes_overrides_and_gives_the_settings_of_one_corpus():
    hub = "data.sources={web: {path: /web}, hub: {name: a/b, split: dev}, here: {source: stdlib}}"
    data = preset("tiny", hub, "data.sources.web.weight=0.5", "data.val_fraction=0.02").data
    assert data.sources["web"].weight == 0.5
    of = corpora(data)
    kinds = {"web": Source.files, "hub": Source.hub, "here": Source.stdlib}
    assert {name: one.source for name, one in of.items()} == kinds
    assert (of["hub"].name, of["hub"].split, of["web"].path, of["web"].split) == ("a/b", "dev", "/web", "train")
    assert all(one.val_fraction == 0.02 and not one.sources for one in of.values())
    alone = preset("tiny", "data=files", "data.path=/c", "data.stages=[{until: 1e13}]").data
    assert corpora(alone)["files"].path == "/c" and corpora(alone)["files"].stages == []


def test_runs_of_one_corpus_keep_their_names_and_a_mixture_has_one_by_its_recipe():
    assert preset("7b", "data=files", "data.path=/c").name == "7b-files-15184c8"
    names = {
        preset("tiny", *overrides).name
        for overrides in (
            [WEB_AND_CODE],
            [WEB_AND_CODE, "data.sources.web.weight=0.6"],
            [WEB_AND_CODE, "data.stages=[{until: 1e13, weights: {web: 1}}]"],
            [WEB_AND_CODE, "train.global_batch='0:8 5e6:16'"],
        )
    }
    assert len(names) == 4 and all(name.startswith("tiny-mixture-") for name in names)


def test_a_ramp_up_is_read_and_a_number_stays_one():
    assert rungs("0:768 250e9:1536") == [Rung(0, 768), Rung(250_000_000_000, 1536)]
    assert rungs("0:4 0.5:8") == [Rung(0, 4), Rung(1, 8)]  # no step begins with half a token trained on
    assert rungs(12) == rungs("12") == [Rung(0, 12)]
    assert preset("tiny", "train.global_batch=12").train.global_batch == 12


def test_what_is_never_reached_is_a_warning():
    late = ["train.global_batch='0:8 4e5:16'", "data.stages=[{until: 3e5}, {until: 9e5}]", "train.total_tokens=3e5"]
    config = preset("tiny", *late)
    found = warnings(config, validate(config, CPU)[0], CPU)
    assert [line.partition(":")[0] for line in found] == ["train.global_batch", "data.stages[1]"]
    assert all("is never reached, since the run ends with train.total_tokens=300000" in line for line in found)


def test_a_run_is_named_by_the_mask_of_documents_that_it_was_told():
    names = [preset("tiny", *said).name for said in ([], ["data.document_mask=true"], ["data.document_mask=false"])]
    assert len(set(names)) == 3
