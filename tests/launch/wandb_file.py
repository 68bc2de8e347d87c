"""Reads what W&B wrote offline: records in LevelDB's log format behind a header of 7 bytes."""

import json
import struct

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7


def records(path):
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = HEADER, []
    while at + HEADER <= len(data):
        room = BLOCK - at % BLOCK
        if room < HEADER:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        parts.append(data[at + HEADER : at + HEADER + length])
        at += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


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
