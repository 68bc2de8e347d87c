"""The report of a study whose sections need no trainings: what a fault in one costs."""

import json
from dataclasses import replace

import pytest

from launch.study import run as study
from launch.study.part import Part, no_runs
from launch.study.settings import Section
from tests.launch.study.small import StandIn, small_study


def _draw(found, facts, folder):
    (folder / f"{found['name']}.png").write_bytes(b"drawn")
    return [folder / f"{found['name']}.png"]


def part(name):
    return Part(
        name,
        no_runs,
        lambda results, found: {"name": name, "figure": 3},
        lambda found, facts: f"{found['name']} is {found['figure']}",
        lambda found: {f"of_{name}": (["figure"], [[found["figure"]]])},
        _draw,
    )


def broken(*what):
    raise ValueError("no such figure")


@pytest.mark.parametrize("what", ["text", "draw", "tables"])
def test_a_fault_in_what_is_made_of_a_section_keeps_the_rest(what, overrides, tmp_path, monkeypatch, capsys):
    logged = {}
    monkeypatch.setattr(study, "wandb_of_study", lambda *given: logged.update(tables=given[3], pictures=given[4]))
    sound = {Section.decode: part("decode"), Section.roofline: part("roofline")}
    parts = {**sound, Section.decode: replace(sound[Section.decode], **{what: broken})}
    command = [*small_study(overrides, tmp_path), "study.sections=[decode,roofline]"]
    assert study.run(command, StandIn(lambda run_dir, step: None), sound) == 0
    assert set(logged["tables"]) == {"of_decode", "of_roofline"} and len(logged["pictures"]) == 2
    (tmp_path / "study.json").unlink()
    capsys.readouterr()

    assert study.run(command, StandIn(lambda run_dir, step: None), parts) == 1
    found = json.loads((tmp_path / "study.json").read_text())["sections"]
    assert found["decode"] == {"name": "decode", "figure": 3}
    text, said = (tmp_path / "study.txt").read_text(), capsys.readouterr()
    names = {"text": "text", "draw": "pictures", "tables": "tables"}
    why = f"decode: its {names[what]} cannot be made: ValueError: no such figure; its numbers"
    assert why in said.err and text in said.out
    assert "roofline is 3" in text and ("decode is 3" in text) == (what != "text") and (why in text) == (what == "text")
    assert set(logged["tables"]) == {"of_roofline", *(["of_decode"] if what != "tables" else [])}
    assert [path.stem for path in logged["pictures"]] == (["decode"] if what != "draw" else []) + ["roofline"]
