"""What W&B wrote offline, in the terms of the tests."""

import json
import time

from train.wandb_file import records

SECONDS = 30


def logged_keys(folder):
    """What the first run of a folder has logged, once W&B's process has closed its file, a moment after `finish`."""
    (path, *_) = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    deadline = time.monotonic() + SECONDS
    while not any(record.WhichOneof("record_type") == "exit" for record in records(path)):
        assert time.monotonic() < deadline, f"{path}: no exit was written in {SECONDS} s"
        time.sleep(0.05)
    return {item.key or item.nested_key[0] for record in records(path) for item in record.history.item}


def history_and_config(path):
    """The logged objects in order, and the run's configuration."""
    history, config = [], {}
    for record in records(path):
        items = record.history.item
        if items:
            history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
        for item in (*record.run.config.update, *record.config.update):
            config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return history, config


def logged_steps(folder):
    """The steps with a loss in all offline parts of a run, in the order they would be uploaded; the run is one."""
    parts = sorted(folder.glob("offline-run-*"))
    assert len({part.name.rpartition("-")[2] for part in parts}) == 1
    files = [file for part in parts for file in part.glob("*.wandb")]
    return [logged["step"] for file in files for logged in history_and_config(file)[0] if "train/loss" in logged]
