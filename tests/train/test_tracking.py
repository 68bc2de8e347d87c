import json
import os
from urllib.parse import urlparse

import wandb

from conf.settings import WandbConfig, WandbMode
from tests.shapes import preset
from train.metrics import PEAK_BF16_FLOPS, peak_flops, peak_memory
from train.tracking import METRICS, SUMMARY, Tracker, set_aside, wandb_mode


def test_wandb_is_offline_without_a_key_and_online_with_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(variable, raising=False)
    assert wandb_mode(WandbConfig()) == "offline"
    assert wandb_mode(WandbConfig(mode=WandbMode.online)) == "online"
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password secret\n")
    netrc.chmod(0o600)
    assert wandb_mode(WandbConfig()) == "online"
    # where this version's `wandb login` writes
    netrc.write_text(f"machine {urlparse(wandb.Settings().base_url).hostname} login user password secret\n")
    assert wandb_mode(WandbConfig()) == "online"
    netrc.rename(tmp_path / "elsewhere")
    assert wandb_mode(WandbConfig()) == "offline"
    monkeypatch.setenv("NETRC", str(tmp_path / "elsewhere"))
    assert wandb_mode(WandbConfig()) == "online"
    monkeypatch.delenv("NETRC")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode(WandbConfig()) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(WandbConfig()) == "disabled"
    assert wandb_mode(WandbConfig(mode=WandbMode.offline)) == "offline"
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert wandb_mode(WandbConfig()) == "offline"
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    assert wandb_mode(WandbConfig()) == "online"


def test_a_run_without_a_server_or_key_is_logged_offline(monkeypatch, tmp_path, caplog):
    def init(*, mode, settings, **run):
        asked.append((mode, os.environ["WANDB_MODE"]))
        assert settings.init_timeout <= 30
        if mode == "online":
            raise wandb.errors.CommError("no such host\nand more")

    asked = []
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    monkeypatch.setattr(wandb, "init", init)
    config = preset("tiny", "wandb.mode=online")
    tracker = Tracker(config, tmp_path, steps=1, facts={})
    assert tracker.mode == "offline" and asked == [("online", "online"), ("offline", "offline")]
    assert "no such host" in caplog.text and "and more" not in caplog.text


def test_what_an_earlier_run_wrote_is_moved_and_the_rest_stays(tmp_path):
    assert set_aside(tmp_path) is None
    for attempt in (1, 2):
        (tmp_path / METRICS).write_text(json.dumps({"step": attempt}))
        (tmp_path / SUMMARY).write_text("{}")
        (tmp_path / ".hydra").mkdir()
        (tmp_path / "notes.txt").write_text("mine")
        moved = set_aside(tmp_path)
        assert moved == tmp_path / "earlier" / str(attempt)
        assert json.loads((moved / METRICS).read_text()) == {"step": attempt}
        assert (moved / SUMMARY).exists() and (moved / ".hydra").is_dir()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier", "notes.txt"]


def test_known_devices(monkeypatch):
    import torch

    gpu = torch.device("cuda")
    for name, peak in [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GB200", 2500e12),
        ("Some GPU", None),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(gpu) == peak, name
    assert peak_flops(torch.device("cpu")) is None
    assert min(PEAK_BF16_FLOPS.values()) > 1e13


def test_memory_on_the_cpu_is_what_the_process_holds():
    import torch

    before = peak_memory(torch.device("cpu"))
    assert 2**20 < before < 2**40
