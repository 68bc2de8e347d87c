"""The page of the report, as text: what stands in it, of which runs, and that nothing else is needed to look at it."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest

from launch.cli import main
from launch.report.panels import panels
from tests.launch.report.folders import (
    ALERT,
    FAILED,
    RECOVERED,
    SETTINGS,
    SKIPPED,
    record,
    records,
    write_run,
    write_timeline,
)
from train.names import GROUPED


class Page(HTMLParser):
    """A page, taken apart."""

    def __init__(self, path):
        super().__init__()
        self.addresses, self.texts, self.scripts, self._in = [], [], [], ""
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.texts).split())
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self._in = tag
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in == "script":
            self.scripts.append(data)
        elif self._in != "style":
            self.texts.append(data)

    def plot(self, title):
        (found,) = [plot for plot in self.data["plots"] if plot["title"] == title]
        return found

    def points(self, title, run=0, role=None, against="step"):
        (trace,) = [one for one in self.plot(title)["traces"] if one["run"] == run and role in (None, one.get("role"))]
        return decoded(self.data["positions"][trace["at"]][against]), decoded(trace["y"])


def decoded(column):
    return np.frombuffer(base64.b64decode(column["bdata"]), "<f4")


def report(tmp_path, *runs, options=()):
    out = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--out", str(out), *options]) == 0
    return Page(out)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two runs, of which the first was skipped a step and failed once, the second has another rate and batch."""
    folder = tmp_path_factory.mktemp("two")
    made = [one if one["step"] != 40 else {**one, "loss": 9.0, "skipped": "loss"} for one in records(100)]
    events = [FAILED, RECOVERED, ALERT]
    texts = [{"step": 50, "prompt": "def ", "text": "<b>f</b>(x):"}]
    one = write_run(folder / "one", made, skipped_jsonl=[SKIPPED], events_jsonl=events, samples_jsonl=texts)
    for step in (10, 20, 90):
        write_timeline(one, step)
    changed = {**SETTINGS, "name": "two", "optimizer": {"lr": 1e-3}}
    two = write_run(folder / "two", (record(step, 4096) for step in range(1, 61)), changed)
    return report(folder, one, two)


def test_nothing_is_loaded_from_elsewhere(two):
    assert two.addresses == ["data:,"]  # the icon, which browsers would ask a server for
    styles = two.source[: two.source.index("</style>")]
    assert "url(" not in styles and "@import" not in styles
    assert len(two.scripts) == 3 and "http" not in two.scripts[2]


def test_a_curve_is_that_of_the_records_against_all_axes(two):
    steps, losses = two.points("Training loss", role="single")
    expected = [9.0 if step == 40 else 4 + 4 / step for step in range(1, 101)]
    np.testing.assert_allclose(losses, np.float32(expected))
    assert steps.tolist() == list(range(1, 101))
    np.testing.assert_allclose(two.points("Training loss", 1, "single", "tokens")[0], 4096 * np.arange(1, 61))
    np.testing.assert_allclose(two.points("Training loss", 1, "single", "hours")[0], np.arange(1, 61) / 7200, rtol=1e-6)
    assert two.points("Validation loss")[0].tolist() == list(range(10, 101, 10))
    assert two.plot("Validation loss")["without"] == ["two"]
    assert (
        two.points("code: bits per byte")[1].tolist()
        == np.float32([(4 + 4 / s) / 3 for s in range(10, 101, 10)]).tolist()
    )


def test_skipped_steps_and_failures_are_marked_with_their_cause(two):
    for role, step, why in (("skipped", 40, SKIPPED["why"]), ("failed", 60, FAILED["cause"])):
        (mark,) = [one for one in two.plot("Training loss")["traces"] if one["role"] == role]
        assert mark["text"] == [why] and mark["run"] == 0
        assert decoded(two.data["positions"][mark["at"]]["step"]).tolist() == [step]
    assert "was killed by SIGKILL" in two.text and "node7" in two.text and "lost 33" in two.text
    order = [two.text.index(one) for one in ("by SIGKILL, rank 1", "disk nearly full", "restarts 1")]
    assert order == sorted(order) and "3.2 GiB are free" in two.text
    assert "320 to 327" in two.text  # its samples


def test_stages_sources_and_timelines(two):
    stages = two.plot("Seconds of a step by stage: one")["traces"]
    assert [(one["label"], one["y"]) for one in stages] == [
        ("forward", [0.1, 0.125]),
        ("backward", [0.2, 0.25]),
        ("waiting", [0.1, 0.025]),
    ]
    first, second = two.plot("Tokens by source")["traces"]
    assert (first["names"], first["y"]) == (["web", "code"], [3 * 204_800 / 4, 204_800 / 4]) and second["run"] == 1
    assert two.plot("Peak memory by stage")["traces"][0]["y"] == [1.5, 1.25]
    # Two stages and four micro-batches: 16 passes measured and as many without waiting, of the first and the last.
    assert two.source[: two.source.index('<script id="data"')].count("<rect") == 2 * 2 * 16
    assert "one: step 10, 1f1b, 4 micro-batches" in two.text and "one: step 90" in two.text
    assert "timelines of steps 20 are kept as well" in two.text


def test_of_a_step_of_1152_micro_batches_its_beginning_and_its_end_are_drawn(tmp_path):
    run = write_run(tmp_path / "run", records(20))
    write_timeline(run, 10, micro_batches=1152)
    page = report(tmp_path, run)
    drawn = page.source[page.source.index('<svg class="timeline"') : page.source.index("</svg>")]
    bars = [(float(x), float(width)) for x, width in re.findall(r'<rect [^>]*x="([\d.]+)"[^>]*width="([\d.]+)"', drawn)]
    assert 2 * 24 < len(bars) < 2 * 40  # of eight micro-batches, and of those that are half done beside them
    assert min(width for _, width in bars) > 8 and max(x + width for x, width in bars) <= 1000
    assert len(re.findall(r"left out: 4[01],\d{3} ms, 99.\d% of the step, with 1,14\d whole micro-batches", drawn)) == 2
    assert drawn.count('class="break"') == 2
    titles = re.findall(r"<title>forward of micro-batch (\d+), stage 0: 10 ms</title>", drawn)
    assert titles[0] == "0" and titles[-1] == "1151"
    # The axis of the end goes on in the time of the step.
    marks = [int(mark.replace(",", "")) for mark in re.findall(r'text-anchor="middle">([\d,]+)</text>', drawn)]
    assert max(marks) > 40_000 and min(marks) < 200


def test_the_head_says_how_far_and_what_differs(two):
    assert "8.0000 → 4.0400" in two.text and "4.0400 at step 100" in two.text
    assert "4,096 tokens/s" in two.text and "tiny, 8 layers x 128, 4 heads on 2" in two.text
    differing = two.source[two.source.index("Settings that differ") : two.source.index("all settings of")]
    assert "optimizer.lr" in differing and "0.003" in differing and "0.001" in differing
    assert "model.d_model" not in differing and "parallel.pp" not in differing
    assert "saves 0.1 s (0.20%)" in two.text and "failures 33 s (66.00%)" in two.text  # of 50 s in steps


def test_what_no_run_has_is_named_with_what_would_have_it(two):
    assert "Model FLOPs utilization (GPUs whose peak is known)" in two.text
    assert "Global batch (a batch or a length that changes)" in two.text
    drawn = {plot["title"] for plot in two.data["plots"]}
    assert "Model FLOPs utilization" not in drawn and "Training loss (" not in two.text


def test_text_of_a_run_is_text_in_the_page(two, tmp_path):
    assert "<b>f</b>(x):" in two.text and "<b>" not in two.source[: two.source.index('<script id="data"')]
    why = "</script><script>alert(1)</script>"
    page = report(tmp_path, write_run(tmp_path / "a<b", records(50), skipped_jsonl=[{**SKIPPED, "why": why}]))
    assert page.data["runs"] == ["a<b"] and len(page.scripts) == 3
    (mark,) = [one for one in page.plot("Training loss")["traces"] if one["role"] == "skipped"]
    assert mark["text"] == [why]


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / parent / "run", records(3)) for parent in ("a", "b")]
    assert report(tmp_path, *folders).data["runs"] == ["a/run", "b/run"]


def test_damaged_empty_and_older_runs_make_a_page_that_says_so(tmp_path):
    torn = [json.dumps(record(1)), '{"step": 2, "loss": 4.', "", "\0\0\0", json.dumps(record(3))]
    null = [record(1), record(2, loss=None, grad_norm=None, nonfinite=["loss", "grad_norm"]), record(3)]
    older = [{"step": step, "loss": 5.0, "tokens": 10 * step, "memory_gib/stage0": 1.0} for step in range(1, 4)]
    runs = [
        write_run(tmp_path / "torn", torn),
        write_run(tmp_path / "empty", []),
        write_run(tmp_path / "null", null, settings=None),
        write_run(tmp_path / "older", older, settings={"name": "older"}),
    ]
    (runs[0] / "timelines").mkdir()
    (runs[0] / "timelines" / "step-00000002.json").write_text('{"step": 2')
    (runs[3] / "summary.json").write_text("{")
    page = report(tmp_path, *runs)
    assert page.points("Training loss", 0, "single")[0].tolist() == [1, 3]
    assert page.points("Training loss", 2, "single")[0].tolist() == [1, 3]
    assert page.points("Training loss", 3, "single", "tokens")[0].tolist() == [10, 20, 30]
    assert "torn : metrics.jsonl: " in page.text and "no records" in page.text
    assert "empty : metrics.jsonl has no records" in page.text
    assert "null : .hydra/config.yaml is not there" in page.text and "null : 1 records have no finite loss" in page.text
    assert "the timeline of step 2 cannot be read" in page.text and "summary.json" in page.text
    assert {one["run"] for one in page.plot("Training loss")["traces"]} == {0, 2, 3}
    assert page.plot("Training loss")["without"] == ["empty"]


def test_a_run_that_has_only_been_passed_over_or_validated_makes_a_page(tmp_path):
    made = [{"step": 0, "tokens": 0, "val_loss": 7.0}, {"step": 1, "tokens": 10, "passed_over": True}]
    page = report(tmp_path, write_run(tmp_path / "run", made))
    assert [plot["title"] for plot in page.data["plots"]] == ["Validation loss"]


def test_a_long_run_is_thinned_and_its_spike_stays(tmp_path):
    made = (record(step, loss=30.0 if step == 7777 else 4.0 + step % 7 / 100) for step in range(1, 20_001))
    page = report(tmp_path, write_run(tmp_path / "run", made))
    steps, losses = page.points("Training loss", role="single")
    assert losses[steps == 7777].tolist() == [30.0] and 1500 < len(steps) < 2500
    assert len(page.source) < 7e6 and "points are in this page" not in page.text[:100]
    assert "no spike is lost" in page.text


def test_what_others_have_written_makes_a_page(tmp_path):
    lines = [record(1), '{"step": 2, "loss": Infinity, "tokens": 1' + 400 * "0" + "}", {**record(3), "loss": 2.0}]
    skips = [SKIPPED]
    settings = {**SETTINGS, "alerts": {"command": "curl https://secret"}}
    made = write_run(tmp_path / "run", lines, settings, skipped_jsonl=skips)
    write_timeline(made, 10)
    (made / "timelines" / "step-last.json").write_text("{}")
    with open(made / "events.jsonl", "w") as file:
        file.write("[" * 100_000 + "\n")
    report(tmp_path, made)
    page = (tmp_path / "page.html").read_text()
    assert "curl …" in page and "https://secret" not in page


def test_what_cannot_be_is_said_at_once(tmp_path, capsys):
    run = write_run(tmp_path / "run", records(3))
    assert main(["report", str(run), str(tmp_path / "none"), str(run)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "no run folder" in said[0] and "2 times" in said[1]
    assert main(["report", str(run), "--out", str(run / "metrics.jsonl" / "page.html")]) == 2
    assert "--out=" in capsys.readouterr().err


def test_a_run_alone_has_its_page_in_its_folder(tmp_path, capsys):
    run = write_run(tmp_path / "run", records(3))
    assert main(["report", str(run), "--x", "hours"]) == 0
    assert Page(run / "report.html").data["axis"] == "hours"
    assert capsys.readouterr().out.startswith(f"{run / 'report.html'}: 1 run,")


def test_every_figure_of_records_has_a_panel():
    """But those that are an axis, a mark, a limit of a skipped step, a picture or a table."""
    drawn = {figure.partition(".")[0] for panel in panels() for figure in panel.figures}
    others = {"step", "tokens", "skipped", "loss_limit", "grad_norm_limit", "passed_over", "timeline", "eval_table"}
    assert set(GROUPED) - others == drawn & set(GROUPED)


def test_plotly_knows_the_attributes_that_the_script_uses():
    """The Python classes of the same version check what plotly.js would silently ignore."""
    go.Figure(
        data=[
            go.Scatter(line={"dash": "longdash"}, marker={"symbol": "triangle-down"}, hovertemplate="%{y:.2%}"),
            go.Scatter(x={"dtype": "f4", "bdata": "AACAPw=="}, y={"dtype": "f4", "bdata": "AACAPw=="}),
        ],
        layout={
            "hovermode": "x unified",
            "barmode": "stack",
            "yaxis": {"rangemode": "tozero", "exponentformat": "B", "dtick": "D2", "tickformat": ".3~g"},
            "modebar": {"bgcolor": "rgba(0,0,0,0)"},
        },
    )
