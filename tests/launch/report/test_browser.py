"""The page of the report in a real browser, without a network: what is drawn, and what its buttons do."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from launch.cli import main
from parallel.schedules import Pass
from tests.launch.report.folders import FAILED, SETTINGS, SKIPPED, record, records, write_run, write_timeline
from tests.train.test_palette import contrast
from train.palette import PASSES, PASSES_ON_DARK, WAITING, WAITING_ON_DARK

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed here")

# What a reader does, and what is seen then: it is left in the document, which the browser prints.
READER = """
<pre id="found"></pre>
<script>
const lines = (id) => document.querySelectorAll(`#${id} .scatterlayer path.js-line`).length;
const shown = (id) => document.getElementById(id)._fullLayout;
const click = (selector) => document.querySelector(selector).click();
async function settled() {
  while (document.documentElement.dataset.drawn === undefined) await new Promise((done) => setTimeout(done, 20));
  delete document.documentElement.dataset.drawn;
}
const found = { errors: [] };
const styled = (selector, what) => getComputedStyle(document.querySelector(selector))[what];
// What the page looks like: texts and what lies behind them, passes as the timelines and the bars of plots have them.
function looks() {
  const bars = DATA.plots.find((plot) => plot.kind === "shares");
  return {
    page: styled("body", "backgroundColor"),
    card: styled("figure", "backgroundColor"),
    on_page: [styled("body", "color"), styled("p.pale", "color")],
    on_card: [styled("figcaption", "color"), styled("svg.timeline text", "fill"),
      document.querySelector(`#${bars.id} .xtick text`).style.fill],
    passes: ["F", "B"].map((what) => styled(`svg.timeline rect.${what}`, "fill")),
    bars: document.getElementById(bars.id)._fullData.map((trace) => trace.marker.color),
  };
}
addEventListener("error", (event) => found.errors.push(event.message));
addEventListener("unhandledrejection", (event) => found.errors.push(String(event.reason)));
(async () => {
  await settled();
  const id = (title) => DATA.plots.find((plot) => plot.title === title).id;
  const loss = id("Training loss"), val = id("Validation loss"), norm = id("Gradient norm");
  found.drawn = Object.fromEntries(DATA.plots.map((plot) => {
    const box = document.getElementById(plot.id);
    const parts = box.querySelectorAll(".scatterlayer path, .barlayer path");
    return [plot.title, [...parts].filter((part) => part.getAttribute("d")?.length > 10).length];
  }));
  found.axis = shown(loss).xaxis.title.text;
  found.lines = lines(loss);
  found.colors = [0, 1].map((run) => {
    const own = document.getElementById(norm)._fullData.find((trace) => trace.name === DATA.runs[run]).line.color;
    const mark = getComputedStyle(document.querySelector(`button[data-run="${run}"]`)).getPropertyValue("--run");
    return [own, document.getElementById(loss)._fullData.find((one) => one.name === DATA.runs[run]).line.color, mark];
  });
  click('[data-axis="hours"]'); await settled();
  found.alike = [loss, val, norm].map((one) => shown(one).xaxis.range.join());
  found.hours = [shown(loss).xaxis.title.text, shown(loss).xaxis.range[1]];
  click('[data-axis="step"]'); await settled();
  await Plotly.relayout(loss, { "xaxis.range[0]": 20, "xaxis.range[1]": 30 });
  await new Promise((done) => setTimeout(done, 300));
  found.zoomed = [...shown(norm).xaxis.range];
  click('[data-toggle="log"]'); await settled();
  found.log = [shown(loss).xaxis.type, shown(val).xaxis.type];
  click('[data-toggle="single"]'); await settled();
  found.means = lines(loss);
  click('[data-run="1"]'); await settled();
  found.alone = [lines(loss), document.querySelector('td[data-of-run="1"]').hidden];
  found.preferred = looks();
  click("[data-theme-button]"); await settled();
  found.other = looks();
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script>
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the browser shows of two runs, and what it writes to its console."""
    folder = tmp_path_factory.mktemp("browser")
    one = write_run(folder / "one", records(60), skipped_jsonl=[SKIPPED], events_jsonl=[FAILED])
    write_timeline(one, 10)
    two = write_run(folder / "two", (record(step, 4096) for step in range(1, 61)), {**SETTINGS, "name": "two"})
    page = folder / "page.html"
    assert main(["report", str(one), str(two), "--out", str(page)]) == 0
    page.write_text(page.read_text("utf-8").replace("</body>", READER + "</body>"), "utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--window-size=1400,1000"]
    command += ["--blink-settings=preferredColorScheme=0"]  # dark
    command += ["--virtual-time-budget=120000", "--dump-dom", page.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    left = re.search(r'<pre id="found">(.*?)</pre>', ended.stdout, re.DOTALL)
    console = [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    assert left and left[1], (console, ended.stdout[-500:])
    return json.loads(unescape(left[1])), console


def test_all_plots_are_drawn_without_an_error(seen):
    found, console = seen
    assert found["errors"] == [] and console == []
    assert len(found["drawn"]) > 15 and min(found["drawn"].values()) >= 1, found["drawn"]
    assert found["lines"] == 4  # of each run the single steps and their mean


def test_a_run_has_one_colour_everywhere(seen):
    one, other = seen[0]["colors"]
    assert len(set(one)) == 1 and len(set(other)) == 1 and one[0] != other[0]


def test_the_axis_the_zoom_and_the_runs_are_changed_for_all_plots(seen):
    found, _ = seen
    assert found["axis"] == "tokens trained on" and found["hours"][0].startswith("hours")
    assert found["hours"][1] == pytest.approx(60 / 7200 * 1.02, rel=1e-3)  # 60 steps of half a second
    assert len(set(found["alike"])) == 1
    assert found["zoomed"] == [20, 30] and found["log"] == ["log", "log"]
    assert found["means"] == 2 and found["alone"] == [1, True]


def rgb(text):
    """A colour as CSS says it computed, as #RRGGBB."""
    return "#" + "".join(f"{int(value):02X}" for value in re.findall(r"\d+", text)[:3])


def test_it_is_dark_where_that_is_preferred_and_light_when_asked(seen):
    dark, light = seen[0]["preferred"], seen[0]["other"]
    assert (rgb(dark["page"]), rgb(light["page"])) == ("#12161D", "#F6F7F9")
    for look, passes, waiting in ((dark, PASSES_ON_DARK, WAITING_ON_DARK), (light, PASSES, WAITING)):
        assert min(contrast(rgb(color), rgb(look["page"])) for color in look["on_page"]) > 4.5  # WCAG 2.1, level AA
        assert min(contrast(rgb(color), rgb(look["card"])) for color in look["on_card"]) > 4.5
        assert [rgb(color) for color in look["passes"]] == [passes[Pass.F], passes[Pass.B]]
        assert look["bars"] == [passes[Pass.F], passes[Pass.B], waiting]
