"""Whole runs in forked ranks, and what they leave."""

import json
import math
import time

from safetensors.torch import load_file

from tests.ranks import nursery
from train.checkpoint import manifest

STEPS = 12
PATIENT = "tests.train.checkpoint.patient"
"""The module of a run that makes all saves that are due: else one is left out while another is still being written."""
DEFAULTS = [
    *["sample.tokens=0", "train.val_every=4", "train.val_sequences=4", f"train.max_steps={STEPS}"],
    *["checkpoint.keep_last=100", "checkpoint.every_steps=2", "wandb.mode=disabled", "train.timeline_at=[]"],
]


def start(folder, num, *overrides, module="train.pretrain", before=(), **environment):
    """A run of `num` ranks in its folder, saved every two steps, unless overrides say otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {override.partition("=")[0] for override in overrides}
    defaults = [override for override in DEFAULTS if override.partition("=")[0] not in given]
    arguments = [*before, *defaults, *overrides, f"hydra.run.dir={folder}"]
    return nursery().start(module, num, arguments, folder, **environment)


def finish(folder, num, *overrides, code=0, module="train.pretrain"):
    """The same, to its end; what was said."""
    codes = start(folder, num, *overrides, module=module).wait(120)
    said = "".join((folder / f"rank{rank}.log").read_text() for rank in range(num))
    assert codes == [code] * num, f"{codes}\n{said[-4000:]}"
    return said


def wait_for(happens, ranks, timeout=60):
    """Wait until something happens, all ranks have ended, or the time is over."""
    deadline = time.monotonic() + timeout
    while not happens() and None in ranks.codes and time.monotonic() < deadline:
        time.sleep(0.005)


def saved(folder, step):
    return folder / "checkpoints" / f"step-{step:08d}"


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder):
    """Losses and gradient norm of every step; no step is missing or stands twice."""
    records = metrics(folder)
    assert [record["step"] for record in records] == list(range(records[0]["step"], records[-1]["step"] + 1))
    keys = ("loss", "grad_norm", "val_loss", "lr", "tokens")
    return {record["step"]: {key: record[key] for key in keys if key in record} for record in records}


def digests(checkpoint):
    """The checksums of all tensors; the same only where every bit is."""
    found = manifest.read(checkpoint)
    manifest.check_files(checkpoint, found)
    return {name: entry["sha256"] for name, entry in found.files.items()}


def whole(checkpoint):
    """Every tensor of a checkpoint, put together from its pieces with the safetensors library alone."""
    found = manifest.read(checkpoint)
    files = {name: load_file(checkpoint / name) for name in found.files if name.endswith(".safetensors")}
    tensors = {}
    for name, entry in found.tensors.items():
        first = files[entry["pieces"][0]["file"]][entry["pieces"][0]["key"]]
        tensor = first.new_full(entry["shape"], math.nan)
        for piece in entry["pieces"]:
            view = tensor
            for dim, (at, size) in enumerate(zip(piece["offset"], piece["shape"], strict=True)):
                view = view.narrow(dim, at, size)
            assert view.isnan().all(), f"{name}: pieces overlap"
            view.copy_(files[piece["file"]][piece["key"]])
        assert not tensor.isnan().any(), f"{name}: a gap between pieces"
        tensors[name] = tensor
    return tensors
