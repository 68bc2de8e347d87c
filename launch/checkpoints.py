"""The contents of checkpoints, and whether they are sound (`deepnarrow inspect`)."""

from pathlib import Path
from typing import Any

from model.problems import BadInput
from parallel.layout import Layout
from train.checkpoint import manifest
from train.checkpoint.folder import below, step_of
from train.checkpoint.manifest import Damaged


def found_at(path: Path) -> list[Path]:
    """Return a checkpoint itself, or those of a run folder or folder of checkpoints, newest first.

    Raises:
        BadInput: no checkpoint is there.
    """
    if path.is_dir() and ((path / manifest.MANIFEST).exists() or step_of(path.resolve()) is not None):
        return [path]
    found = below(path)
    if not found:
        raise BadInput([f"{path}: no checkpoint is there; a run folder or one of its checkpoints/step-… would work"])
    return found


def inspect(path: Path) -> dict[str, Any]:
    """Return the facts of one checkpoint, after reading every file and comparing it with its checksum."""
    facts: dict[str, Any] = {"path": str(path), "sound": False}
    try:
        found = manifest.read(path)
        config, layout = found.config, found.layout
        facts |= {
            "step": found.step,
            "tokens": found.tokens,
            "preset": config["preset"],
            "parameters": found.num_parameters,
            "model": config["model"],
            "layout": {axis: layout[axis] for axis in ("dp", "pp", "tp", "sequence_parallel")},
            "written": found.written,
            "code": found.code,
            "origin": found.origin,
            "files": len(found.files),
            "bytes": found.num_bytes,
        }
        manifest.check_files(path, found)
        facts["sound"] = True
    except Damaged as damage:
        facts["damage"] = str(damage)
    return facts


def as_text(facts: dict[str, Any]) -> str:
    """Render the results of `inspect` as text."""
    lines = [facts["path"]]
    if "step" in facts:
        model, layout, size = facts["model"], Layout(**facts["layout"]), facts["bytes"]
        lines += [
            f"  step     {facts['step']:,}, {facts['tokens']:,} tokens",
            f"  model    {facts['preset']}: {facts['parameters']:,} parameters, "
            f"{model['n_layers']} layers x {model['d_model']}",
            f"           {model['n_heads']} heads on {model['n_kv_heads']}, vocabulary {model['vocab_size']:,}",
            f"  written  {facts['written']} by {layout}, code {facts['code']}",
            f"  size     {size:,} bytes in {facts['files']} files, {size / facts['parameters']:.2f} per parameter",
        ]
        if facts["origin"]:
            lines.append(f"  origin   {facts['origin']}")
    sound = "yes, every file has the size and checksum of the manifest" if facts["sound"] else f"NO: {facts['damage']}"
    return "\n".join([*lines, f"  sound    {sound}"])
