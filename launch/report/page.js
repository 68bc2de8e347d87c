// The plots of the report: all runs in the same colours, one axis for all curves, zoomed together.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const COLORS = DATA.colors;
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const MARKS = { skipped: "x", failed: "triangle-down" };
const PASSES = ["--F", "--B", "--W", "--waiting"];

const state = { axis: DATA.axis, log: false, single: true, hidden: new Set(), range: null };
const preferred = matchMedia("(prefers-color-scheme: dark)");
const theme = () => document.documentElement.dataset.theme ?? (preferred.matches ? "dark" : "light");
const color = (run) => COLORS[run % COLORS.length];
// A run beyond the last colour has the first again, dashed otherwise.
const dash = (run, turn) => DASHES[(turn + 2 * Math.floor(run / COLORS.length)) % DASHES.length];
const shade = (hex, opacity) => hex + Math.round(255 * opacity).toString(16).padStart(2, "0");

function curves(plot) {
  return plot.traces.filter((trace) => !state.hidden.has(trace.run)).flatMap((trace) => {
    const { run, role } = trace;
    const name = DATA.runs[run] + (trace.label ? ", " + trace.label : "");
    const made = { type: "scatter", mode: "lines", name, x: DATA.positions[trace.at][state.axis], y: trace.y };
    if (role === "single") {
      if (!state.single) return [];
      made.line = { color: shade(color(run), trace.thinned ? 0.16 : 0.3), width: 1, dash: dash(run, 0) };
      made.name = name + ", single step";
    } else if (role in MARKS) {
      made.mode = "markers";
      made.marker = { symbol: MARKS[role], size: 10, color: color(run), line: { width: 1, color: css("--page") } };
      made.text = trace.text;
      made.hovertemplate = "%{y:.5~g}: %{text}";
    } else {
      made.line = { color: color(run), width: role === "mean" ? 2 : 1.6, dash: dash(run, trace.dash) };
      if (role === "points") { made.mode = "lines+markers"; made.marker = { size: 5, color: color(run) }; }
    }
    made.hovertemplate ??= plot.percent ? "%{y:.2%}" : "%{y:.5~g}";
    return [made];
  });
}

function bars(plot) {
  return plot.traces.filter((trace) => !state.hidden.has(trace.run)).map((trace) => ({
    type: "bar",
    name: plot.kind === "shares" ? trace.label : DATA.runs[trace.run],
    x: trace.names,
    y: trace.y,
    marker: { color: plot.kind === "shares" ? css(PASSES[trace.pass]) : color(trace.run) },
    hovertemplate: "%{y:.4~g}",
  }));
}

// The range of all curves together, so that what lies above one another happened at the same time.
function whole() {
  const [low, high] = DATA.extents[state.axis];
  return state.log ? [Math.log10(low), Math.log10(high)] : [0, high * 1.02];
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function layout(plot) {
  const grid = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
  const made = {
    margin: { l: 12, r: 14, t: 26, b: 12 },
    height: 300,
    font: { family: "system-ui, sans-serif", size: 12, color: css("--text") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--text") }, namelength: -1 },
    hovermode: "x unified",
    barmode: plot.kind === "shares" ? "stack" : "group",
    bargap: 0.3,
    // Colours say which run; what else there is to tell apart has a legend of its own.
    showlegend: plot.kind === "shares",
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--line"), activecolor: css("--pale") },
    yaxis: {
      ...grid,
      title: { text: plot.unit, standoff: 6 },
      type: plot.log ? "log" : "linear",
      exponentformat: "B",
      rangemode: plot.zero ? "tozero" : "normal",
    },
    xaxis: { ...grid },
  };
  if (plot.percent) Object.assign(made.yaxis, { tickformat: ".3~p", autorangeoptions: { minallowed: 0, maxallowed: 1 } });
  // Without a format, plotly.js writes a lone 2 or 5 between powers of ten.
  if (plot.log) Object.assign(made.yaxis, { tickformat: ".3~g", dtick: plot.decades > 5 ? 1 : plot.decades > 1 ? "D2" : undefined });
  else if (plot.small) made.yaxis.tickformat = ".3~g"; // not 300µ
  if (plot.kind === "curves") {
    made.xaxis.title = { text: DATA.axes[state.axis], standoff: 6 };
    made.xaxis.type = state.log ? "log" : "linear";
    made.xaxis.exponentformat = "B";
    if (state.log) made.xaxis.nticks = 8;
    made.xaxis.range = state.range ? [...state.range] : whole();
  } else {
    Object.assign(made.xaxis, { type: "category", title: { text: plot.across, standoff: 6 } });
    if (plot.top) made.yaxis.range = [0, plot.top]; // the same of all runs
  }
  return made;
}

const CONFIG = {
  displaylogo: false,
  responsive: true,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
  toImageButtonOptions: { format: "svg" },
};

function draw(plot) {
  const box = document.getElementById(plot.id);
  box.closest("figure").hidden = plot.run !== undefined && state.hidden.has(plot.run);
  const traces = plot.kind === "curves" ? curves(plot) : bars(plot);
  const config = { ...CONFIG, displayModeBar: plot.kind === "shares" ? false : "hover" }; // where the legend is
  return Plotly.react(box, traces, layout(plot), config).then(() => {
    if (plot.kind === "curves" && !box.dataset.listens) {
      box.dataset.listens = "yes";
      box.on("plotly_relayout", (change) => zoomed(plot, change));
    }
  });
}

// A curve that is zoomed along its axis takes all others with it.
let following = false;
function zoomed(from, change) {
  const range = change["xaxis.range"] ?? [change["xaxis.range[0]"], change["xaxis.range[1]"]];
  if (following || (range[0] === undefined && !change["xaxis.autorange"])) return;
  state.range = range[0] === undefined ? null : range;
  following = true;
  const others = DATA.plots.filter((plot) => plot.kind === "curves" && plot !== from);
  const update = { "xaxis.range": state.range ? [...state.range] : whole() };
  Promise.all(others.map((plot) => Plotly.relayout(plot.id, update))).finally(() => { following = false; });
}

// Drawn one after another, so that the page can be read meanwhile.
let turn = 0;
async function drawAll() {
  const mine = ++turn;
  for (const mark of document.querySelectorAll("[data-color]")) {
    mark.style.setProperty("--run", color(Number(mark.dataset.color)));
    mark.classList.toggle("again", Number(mark.dataset.color) >= COLORS.length);
  }
  for (const plot of DATA.plots) {
    await draw(plot);
    await new Promise((resolve) => setTimeout(resolve, 0));
    if (mine !== turn) return;
  }
  document.documentElement.dataset.drawn = String(DATA.plots.length);
}

function control(selector, act) {
  for (const button of document.querySelectorAll(selector)) {
    button.addEventListener("click", () => { act(button); drawAll(); });
  }
}

function pressed(button, on) {
  button.setAttribute("aria-pressed", String(on));
  return on;
}

control("[data-run]", (button) => {
  const run = Number(button.dataset.run);
  const hide = !state.hidden.has(run);
  hide ? state.hidden.add(run) : state.hidden.delete(run);
  pressed(button, !hide);
  for (const other of document.querySelectorAll(`[data-of-run="${run}"]`)) other.hidden = hide;
});
control("[data-axis]", (button) => {
  state.axis = button.dataset.axis;
  state.range = null;
  for (const other of document.querySelectorAll("[data-axis]")) pressed(other, other === button);
});
control("[data-toggle]", (button) => {
  const what = button.dataset.toggle;
  state[what] = pressed(button, !state[what]);
  if (what === "log") state.range = null;
});
control("[data-theme-button]", () => {
  document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
});
preferred.addEventListener("change", drawAll);
drawAll();
