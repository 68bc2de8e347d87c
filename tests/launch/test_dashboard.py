"""The workspace of W&B: that it is what W&B's own library takes, has what runs log, and is saved."""

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from launch.cli import main
from tests.launch.report.folders import record, records
from train.names import grouped

pytest.importorskip("wandb_workspaces")


@pytest.fixture
def spec(tmp_path, capsys):
    out = tmp_path / "workspace.json"
    assert main(["dashboard", "--project", "deep", "--entity", "team", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    return json.loads(out.read_text("utf-8"))


def sections_of(spec):
    return {one["name"]: one["panels"] for one in spec["spec"]["section"]["panelBankConfig"]["sections"]}


def test_the_library_reads_back_what_it_is_said_to_keep(spec):
    from wandb_workspaces.workspaces import Workspace, internal

    model = internal.View.model_validate(spec)
    again = Workspace._from_model(model)
    assert (again.entity, again.project, again.settings.x_axis) == ("team", "deep", "tokens")
    names = [section.name for section in again.sections]
    assert names == list(sections_of(spec)) and {"Learning", "Pipeline", "GQA studies"} <= set(names)
    assert again._to_model().model_dump(mode="json", by_alias=True, exclude_none=True) == spec


def test_charts_are_of_the_names_that_runs_log(spec):
    further = {"mfu": 0.5, "mfu_whole_attention": 0.6, "predicted_seconds": 0.4, "flops_per_token": 1e9, "restarts": 1}
    further |= {"weight_seconds": [0.1, 0.1], "slow_ranks": {"3": 1.3}, "skipped_steps": 2, "failed_tasks": 1}
    further |= {"global_batch": 8, "seq_len": 256, "val_bits_per_byte": 1.0}
    tasks = {"lm_eval/own": {"accuracy": 0.5, "accuracy_norm": 0.5, "bits_per_byte": 1.0}}
    logged = {name for one in records(10) for name in grouped(one)} | set(grouped(record(11, **further, tasks=tasks)))
    panels = [panel for section in sections_of(spec).values() for panel in section]
    charts = [one["config"] for one in panels if one["viewType"] == "Run History Line Plot"]
    assert len(charts) > 20
    for chart in charts:
        assert chart["xAxis"] == "tokens"
        if "metricRegex" in chart:
            assert any(re.search(chart["metricRegex"], name) for name in logged), chart
        else:
            assert chart["metrics"] and set(chart["metrics"]) <= logged, chart
    (waits,) = [chart for chart in charts if "wait_seconds" in chart.get("metricRegex", "")]
    assert re.search(waits["metricRegex"], "pipeline/stage11/wait_seconds")
    assert not re.search(waits["metricRegex"], "pipeline/bubble")
    media = [one["config"]["mediaKeys"] for one in sections_of(spec)["Pipeline"] if one["viewType"] == "Media Browser"]
    assert media == [["pipeline/timeline"]]


def test_without_an_account_it_says_what_works_without_one(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert main(["dashboard"]) == 2
    said = capsys.readouterr().err
    assert "WANDB_MODE=offline" in said and "--print" in said and "deepnarrow report" in said
    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.setenv("NETRC", "/nonexistent")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert main(["dashboard"]) == 2
    assert "no W&B account is set up" in capsys.readouterr().err
    assert main(["dashboard", "--print"]) == 0
    assert json.loads(capsys.readouterr().out)["project"] == "deepnarrow"


def test_without_the_extra_it_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.workspaces", None)
    assert main(["dashboard", "--print"]) == 2
    assert "pip install -e '.[dashboard]'" in capsys.readouterr().err


class WandbServer(BaseHTTPRequestHandler):
    """As much of W&B's server as a workspace needs: who asks, and keeping a view."""

    views: list = []  # noqa: RUF012, of the one test that uses it

    def do_POST(self):
        """Answer a query of GraphQL."""
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        asked = json.loads(body) if body.startswith(b"{") else {"query": ""}
        found = {
            "viewer": {"id": "u", "entity": "someone", "username": "someone", "flags": "{}", "teams": {"edges": []}}
        }
        if "upsertView" in asked["query"]:
            self.views.append(asked["variables"])
            found = {"upsertView": {"view": {"id": "V1", "name": asked["variables"]["name"]}, "inserted": True}}
        answer = json.dumps({"data": found}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        """Say nothing."""


def test_it_is_saved_in_the_accounts_own_project(capsys, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), WandbServer)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", "online")
    import wandb

    try:
        assert main(["dashboard", "--project", "deep"]) == 0
        (saved,) = WandbServer.views
        assert (saved["entityName"], saved["projectName"], saved["type"]) == ("someone", "deep", "project-view")
        kept = json.loads(saved["spec"])
        assert "Learning" in [one["name"] for one in kept["section"]["panelBankConfig"]["sections"]]
        assert capsys.readouterr().out.startswith(f"http://127.0.0.1:{server.server_port}/someone/deep?nw=")
    finally:
        wandb.teardown()
        server.shutdown()
        server.server_close()
