import json
import re

import numpy as np
import pytest
from PIL import Image

from launch.cli import main
from launch.compare import command
from launch.compare.command import compare, said, shown
from launch.compare.curves import NEEDED, WINDOWS, Losses, at_shares, averages, losses_of, part, share_to_reach, smooth
from launch.compare.settings import ABSENT, CODE, EXECUTION, FOLLOWS, OTHER, RECIPE, differing
from launch.compare.terminal import Line, plot
from launch.run_folder import RunFolder
from launch.tables import rendered
from tests.launch.folders import NAN, OPEN, records, write_run
from train.palette import COLORS


def falling(tokens):
    return 2 + 4 * np.exp(-tokens / 4e5)


def losses(count=1000, batch=1000, noise=0.1, seed=0, curve=falling, axis_first=0.0):
    x = axis_first + np.arange(count) * batch
    drawn = np.random.default_rng(seed).normal(scale=noise, size=count)
    none = np.empty(0)
    return Losses(np.arange(1, count + 1.0), x, curve(x) + drawn, x + batch, none, none, 0, 0)


def test_averages_are_those_of_the_line_through_the_points():
    x, y = np.array([0.0, 1.0, 3.0, 4.0]), np.array([0.0, 2.0, 0.0, 5.0])
    np.testing.assert_allclose(averages(x, y, np.array([0.0, 1.0, 2.0, 4.0])), [1.0, 1.5, (0.5 + 2.5) / 2])
    np.testing.assert_allclose(averages(x, y, np.array([0.25, 0.75])), [1.0])
    fine = np.linspace(0, 4, 400_001)
    assert averages(x, y, np.array([0.3, 3.7]))[0] == pytest.approx(
        np.interp(fine[30_000:370_001], x, y).mean(), abs=1e-5
    )


def test_runs_of_one_curve_do_not_part_and_errors_are_what_chance_makes():
    """Over 200 pairs of runs, of the same batches and of others, the end differs as its error says."""
    for batch in (1000, 2500):
        scores, parted = [], 0
        for seed in range(100):
            found = part(losses(2000 * 1000 // batch, batch, seed=seed), losses(2000, seed=1000 + seed))
            assert found.paired == (batch == 1000)
            scores.append(found.end / found.end_error)
            parted += found.parts_at is not None
        assert parted == 0
        assert 0.8 < np.std(scores) < 1.25 and abs(np.mean(scores)) < 0.4
        assert found.noise == pytest.approx(0.1 * np.sqrt(1 + 1000 / batch), rel=0.2)


@pytest.mark.parametrize("batch", [1000, 2000, 700])
def test_the_place_where_curves_part_is_found(batch):
    def leaves(tokens):
        return falling(tokens) + 0.3 * np.clip((tokens - 1e6) / 1e5, 0, 1)

    found = part(losses(2_000_000 // batch, batch, seed=1, curve=leaves), losses(2000, seed=2))
    assert 0.98e6 <= found.parts_at <= 1.1e6
    assert found.parts_at_step == pytest.approx(found.parts_at / batch, abs=2)
    assert found.end == pytest.approx(0.3, abs=4 * found.end_error) and found.end_error < 0.03
    lower = part(losses(2000, seed=2), losses(2_000_000 // batch, batch, seed=1, curve=leaves))
    assert lower.end == pytest.approx(-found.end) and lower.parts_at == found.parts_at


def test_noise_that_runs_share_cancels():
    shared = losses(2000, noise=0.5, seed=3)
    other = Losses(**{**vars(shared), "loss": shared.loss + np.where(shared.x > 1e6, 0.01, 0.0)})
    found = part(other, shared)
    assert found.alike_until == 1001 and found.noise < 1e-3  # only the jump itself
    assert found.end == pytest.approx(0.01) and 0.95e6 < found.parts_at < 1.03e6
    assert part(shared, shared).alike_until == 2000 and part(shared, shared).parts_at is None


def test_noise_of_samples_that_runs_of_other_batches_share_cancels_too():
    fine = losses(2000, 1000, noise=0.1, seed=4)
    coarse = losses(1000, 2000, noise=0.0)
    shared = (fine.loss - falling(fine.x)).reshape(-1, 2).mean(axis=1)
    found = part(Losses(**{**vars(coarse), "loss": coarse.loss + shared + 0.01}), fine)
    assert not found.paired and found.noise < 0.01
    assert found.end == pytest.approx(0.01, abs=2e-4) and found.end_error < 1e-3


def test_steep_curves_of_other_batches_are_no_difference():
    def steep(tokens):
        return 2 + 8 * np.exp(-tokens / 3e4)

    found = part(losses(500, 4000, noise=0.0, curve=steep), losses(2000, 1000, noise=0.0, curve=steep))
    assert len(found.windows) > 20
    later = found.windows > 3e4
    assert np.abs(found.difference[later]).max() < 0.03


@pytest.mark.parametrize("counts", [(0, 0), (0, 100), (1, 100), (5, 100), (20, 20)])
def test_a_few_steps_tell_nothing(counts):
    one, other = (losses(count, noise=0.1, seed=count) for count in counts)
    found = part(one, other)
    assert found.end is None and found.parts_at is None and len(found.windows) == 0
    at_shares([one, other], (0.1, 1.0))
    assert len(smooth(one, 1e4)[0]) <= WINDOWS


def test_the_lower_run_is_as_low_earlier():
    fast = losses(2000, noise=0.01, curve=lambda tokens: falling(2 * tokens))
    slow = losses(2000, noise=0.01, seed=1)
    assert share_to_reach(fast, slow) == pytest.approx(0.49, abs=0.02)
    assert share_to_reach(slow, fast) is None


def test_steps_that_were_skipped_or_are_not_finite_are_left_out_and_counted(tmp_path):
    lines = records(100)
    lines[9] |= {"loss": 80.0, "skipped": "spike", "loss_limit": 5.0}
    lines[19]["loss"] = NAN
    lines[29] = {"step": 30, "tokens": 30_000, "passed_over": True}
    lines[99]["val_loss"] = 3.0
    lines = [{"step": 0, "tokens": 0, "val_loss": 9.0}, *lines]
    found = losses_of(RunFolder(write_run(tmp_path, lines)).columns(*NEEDED), "tokens")
    assert [*found.step] == [step for step in range(1, 101) if step not in (10, 20, 30)]
    assert (found.left_out, found.nonfinite) == (1, 1)
    assert found.x[0] == 0 and found.x[-1] == 99_000 and found.tokens[-1] == 100_000
    assert [*found.val_x] == [0, 100_000] and [*found.val_loss] == [9.0, 3.0]


def test_hours_are_those_of_steps(tmp_path):
    found = losses_of(RunFolder(write_run(tmp_path, records(10))).columns(*NEEDED), "hours")
    np.testing.assert_allclose(found.x, np.arange(10) * 2 / 3600)


SETTINGS = """
preset: tiny
name: {name}
model: {{n_layers: 4, attention: auto}}
data: {{source: files, path: /corpus, sources: {sources}, document_mask: {mask}}}
optimizer: {{lr: {lr}}}
schedule: {{warmup_steps: 10}}
train: {{seed: 1, global_batch: 8, micro_batch: {micro}, max_steps: null, skip_steps: {skip}}}
parallel: {{pp: {pp}}}
wandb: {{mode: {mode}}}
"""
PLAIN = dict(name="one", sources="{}", mask="false", lr="3e-4", micro=2, skip="[]", pp=1, mode="offline")
LAYOUT = {"pp": 1, "tp": 1, "dp": 1, "stages": [{"start": 0, "stop": 6}]}
NOTE = {**OPEN, "code": "a" * 40, "layout": LAYOUT, "parameters": 10, "kernels": "sdpa", "device": "cpu"}


def two(tmp_path, note=None, lines=None, **changed):
    one = write_run(tmp_path / "one", records(400, noise=0.05), NOTE, config=SETTINGS.format(**PLAIN))
    other = write_run(
        tmp_path / "two",
        records(400, noise=0.05, seed=1) if lines is None else lines,
        {**NOTE, **(note or {})},
        config=SETTINGS.format(**{**PLAIN, **changed}),
    )
    return [one, other]


def differ(paths):
    return differing([RunFolder(path) for path in paths])


def test_a_step_that_stands_twice_counts_once(tmp_path):
    lines = records(200)
    write_run(tmp_path / "a", lines, started=OPEN)
    write_run(tmp_path / "b", [*lines, *({**one, "loss": one["loss"] + 1} for one in lines)], started=OPEN)
    found = compare([tmp_path / "a", tmp_path / "b"], "tokens")
    assert len(found.losses[1].loss) == 200
    assert found.partings[0].end == pytest.approx(1.0)


def test_the_arguments_of_the_alerts_command_are_not_shown(tmp_path):
    for name, key in (("a", "secret"), ("b", "other")):
        settings = f"alerts: {{command: [curl, 'https://{key}']}}\nname: {name}\n"
        write_run(tmp_path / name, records(5), started=OPEN, config=settings)
    differ, _ = differing([RunFolder(tmp_path / name) for name in "ab"])
    assert differ and "https://" not in str(differ)


def test_settings_that_differ_stand_in_their_groups(tmp_path):
    pipelined = {**LAYOUT, "pp": 2, "stages": [{"start": 0, "stop": 4}, {"start": 4, "stop": 6}]}
    paths = two(
        tmp_path,
        {"layout": pipelined, "code": "b" * 40, "steps": 500},
        **{"name": "two", "lr": "6e-4", "micro": 4, "pp": 2, "mode": "online", "skip": "[3]"},
        sources="{web: {path: /web, weight: 1.0}}",
    )
    found, unknown = differ(paths)
    assert found[RECIPE] == {
        "optimizer.lr": [3e-4, 6e-4],
        "train.skip_steps": [[], [3]],
        "data.sources.web.path": [ABSENT, "/web"],
        "data.sources.web.weight": [ABSENT, 1.0],
    }
    assert found[EXECUTION] == {"train.micro_batch": [2, 4], "parallel.pp": [1, 2]}
    assert found[OTHER] == {"wandb.mode": ["offline", "online"]}
    assert found[FOLLOWS] == {
        "name": ["one", "two"],
        "steps": [1000, 500],
        "blocks of the stages": [[6], [4, 2]],
    }
    assert found[CODE] == {"commit or version": ["a" * 40, "b" * 40]} and unknown == []


def test_the_same_run_differs_in_nothing(tmp_path):
    assert differ(two(tmp_path)) == ({}, [])


def test_settings_that_a_run_is_too_old_for_count_as_what_it_did(tmp_path):
    paths = two(tmp_path, mask="true")
    old = SETTINGS.replace(", document_mask: {mask}", "").replace("wandb: {{mode: {mode}}}", "")
    (paths[0] / ".hydra" / "config.yaml").write_text(old.format(**PLAIN))
    found, unknown = differ(paths)
    assert found == {RECIPE: {"data.document_mask": [False, True]}, OTHER: {"wandb.mode": [ABSENT, "offline"]}}
    assert unknown == []
    newer = SETTINGS.format(**PLAIN) + "launch: {restarts: 10}\n"  # the default
    (paths[1] / ".hydra" / "config.yaml").write_text(newer)
    found, unknown = differ(paths)
    assert "launch.restarts" in unknown and OTHER in found and "launch.restarts" not in found[OTHER]


@pytest.mark.parametrize("content", [b"", b"[]", b"a: [", b"\xff\xfe\x00", b"model: 7\ndata: x\n", b"a: ${nothing:}\n"])
def test_settings_that_are_damaged_are_said(content, tmp_path):
    paths = two(tmp_path)
    (paths[1] / ".hydra" / "config.yaml").write_bytes(content)
    text = rendered(shown(compare(paths, "tokens"), 118, colored=False))
    assert "B against A: losses differ from the first step on" in text
    if content[:1] != b"m" and b"nothing" not in content:
        assert ".hydra/config.yaml: " in text


def test_what_is_said_of_two_runs(tmp_path, capsys):
    lines = records(400, noise=0.05, seed=0, mfu=0.5)
    for one in lines[200:]:
        one["loss"] += 0.2
    paths = two(tmp_path, {"code": "b" * 40 + "+changes"}, lines=lines, lr="6e-4")
    picture = tmp_path / "losses.png"
    assert main(["compare", *map(str, paths), "--out", str(picture)]) == 0
    text = capsys.readouterr().out
    for line in (
        r"A  one: failed \(process \d+ on here is gone .*\), pp1 tp1 dp1",
        r" optimizer.lr +0.0003 +0.0006",
        r" commit or version +a{12} +b{12}\+changes",
        r"the same in all: layout, and how it is computed, other settings, what follows from them",
        r" loss at 399k tokens \(100% of what all have\) +\d\.\d{4} +\d\.\d{4}",
        r" MFU, median +50.0%",
        r"B against A: losses are the same to the last bit up to step 200",
        r" +they part beyond their noise at (19|20)\dk tokens \(step (19|20)\d of B\)",
        r" +in the end B is 0.2000 ± 0.\d{4} nats above A; a single difference varies by \d.\d{4}",
        r" +A is as low as B in the end after \d\d% of tokens",
    ):
        assert re.search(rf"^{line}$", text, re.MULTILINE), line
    assert "\x1b" not in text and all(len(line) <= 118 for line in text.splitlines())
    drawn = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    blue = tuple(bytes.fromhex(COLORS[1][1:]))  # the averaged curve of the second, which nothing shines through
    assert (drawn == blue).all(axis=1).sum() > 500


def test_json_has_the_figures_of_every_window(tmp_path, capsys):
    paths = two(tmp_path, lines=records(200, batch=2000, noise=0.05, seed=1))
    assert main(["compare", *map(str, paths), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    (against,) = found["against_first"]
    assert against["run"] == "two" and not against["paired"] and against["alike_until_step"] is None
    assert len(against["windows"]) == len(against["difference"]) == len(against["error"]) == 24
    assert [run["letter"] for run in found["runs"]] == ["A", "B"] and found["places"][-1] == 398_000
    assert found["runs"][0]["speeds"]["tokens_per_second"] == 500


@pytest.mark.parametrize("lines", [(), [{"step": 0, "tokens": 0, "val_loss": 3.0}], records(3), [{"step": 1}]])
def test_runs_without_losses_are_compared_all_the_same(lines, tmp_path):
    paths = two(tmp_path, lines=lines)
    for axis in ("tokens", "step", "hours"):
        found = compare(paths, axis)
        assert any("too few" in line or "no loss in common" in line for line in said(found))
        for colored in (True, False):
            assert "A against" not in rendered(shown(found, 100, colored))
    command.draw(found.names, found.losses, found.partings, "tokens", tmp_path / "some.svg")
    assert (tmp_path / "some.svg").stat().st_size > 1000


def test_curves_in_a_terminal_are_where_they_should_be():
    x = np.linspace(0, 100, 50)
    lines = [Line("A", x, x, 0), Line("B", x[:25], np.full(25, 100.0), 1)]
    text = plot(lines, 60, 23, colored=False, name="loss", unit="tokens").plain.split("\n")
    rows = [line.partition("│")[2] for line in text if "│" in line]
    assert len(rows) == 20 and all(len(line) <= 60 for line in text)
    assert rows[-1].startswith("A") and rows[0].endswith("A") and rows[0].startswith("B" * 20)
    assert rows[10].strip() == "A" * len(rows[10].strip()) and 20 < rows[10].index("A") < 32  # half way
    assert "*" not in "".join(rows)
    dots = plot(lines, 60, 23, colored=True, name="loss", unit="tokens")
    rows = [line.partition("│")[2] for line in dots.plain.split("\n") if "│" in line]
    assert {span.style for span in dots.spans} == {"bright_blue", "bright_red"}
    assert all(0x2800 <= ord(char) <= 0x28FF for row in rows for char in row.replace(" ", ""))


def test_letters_that_meet_are_a_star():
    x = np.linspace(0, 10, 11)
    text = plot([Line("A", x, x, 0), Line("B", x, 10 - x, 1)], 40, 14, colored=False, name="", unit="").plain
    assert text.count("*") >= 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["one"], "one: one run is compared with nothing; two or more would work"),
        (["one", "one"], "one: given twice; another run would work"),
        (["one", "nowhere"], "nowhere: no such folder; deepnarrow runs lists those that there are"),
        (["one", "."], ".: no run; one or two would work"),
        (["one", "two", "--out=x.gif"], "--out=x.gif: its end says what is drawn; x.svg or .png would work"),
        (["one", "two", "--out=nowhere/x.svg"], "--out=nowhere/x.svg: No such file or directory"),
        (["one"] * 27, "27 runs: 26 at most would work"),
    ],
)
def test_what_cannot_be_compared_is_said(arguments, problem, tmp_path, monkeypatch, capsys):
    two(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    assert problem in capsys.readouterr().err.splitlines()
