"""The account of a refinement: what was read, what each step removed and why, what is left; it has to add up."""

import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from launch.refine.settings import DOCUMENTS, REMOVED, REPORT, TEXT, Plan, write_json
from model.problems import BadInput
from train.data.tally import Tally
from train.data.units import Unit, joined

_REASONS = 4
"""Reasons that a line of the table names."""


class Report(PipelineStep):
    """Adds up what all tasks have counted, puts the result in its place, and removes what was under way.

    Args:
        plan: the refinement.
        steps: the names of the steps that remove documents.
    """

    type = "📊 - STATS"
    name = "report"

    def __init__(self, plan: Plan, steps: Sequence[str]):
        super().__init__()
        self.plan, self.steps = plan, list(steps)

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the report; its JSON last, which says that the result is whole.

        Raises:
            BadInput: more of the corpus cannot be used than `data.max_bad` allows.
            RuntimeError: the counts do not add up.
        """
        plan = self.plan
        if problems := unusable(plan):  # where nobody looks between the stages, as under Slurm
            raise BadInput(problems)
        found = collect(plan, self.steps)
        under_way, result = plan.work / DOCUMENTS, plan.folder / DOCUMENTS
        if under_way.exists():
            if result.exists():
                shutil.rmtree(result)
            os.rename(under_way, result)
        result.mkdir(exist_ok=True)
        (plan.folder / TEXT).write_text(as_text(found) + "\n", "utf-8")
        (plan.folder / REMOVED).write_text(samples_text(found), "utf-8")
        write_json(plan.folder / REPORT, found)
        for name in ("exact", "minhash", "originals"):
            shutil.rmtree(plan.work / name, ignore_errors=True)


def unusable(plan: Plan) -> list[str]:
    """Say, once all is read, of which sources more cannot be used than `data.max_bad` allows."""
    found = tallies(plan)
    return [problem for name, each in plan.data.items() for problem in found[name].problems(each.max_bad)]


def tallies(plan: Plan) -> dict[str, Tally]:
    """Add up what reading each source met."""
    met: dict[str, list[tuple[Unit, Tally]]] = {name: [] for name in plan.data}
    for rank, task in enumerate(plan.tasks):
        found = json.loads((plan.work / "read" / f"{rank:05d}.json").read_text("utf-8"))["tallies"]
        for piece, tally in zip(task, found, strict=True):
            met[piece.source].append(((piece.part,), Tally(**tally)))
    return {name: joined([unit for unit, _ in each], [tally for _, tally in each]) for name, each in met.items()}


def collect(plan: Plan, steps: Sequence[str]) -> dict[str, Any]:
    """Add up the accounts of all tasks.

    Returns:
        JSON-able: for each source what was read, skipped by the reader, removed by each step (by reason) and left, each
        as documents and bytes of text; samples of each step; and the override that trains on the result.

    Raises:
        RuntimeError: a task has left no account, or the documents or bytes do not add up.
    """
    read = {name: [0, 0] for name in plan.data}
    left = {name: [0, 0] for name in plan.data}
    pieces: list[list[list[Any]]] = []
    for rank in range(len(plan.tasks)):
        account = json.loads((plan.work / "read" / f"{rank:05d}.json").read_text("utf-8"))
        pieces.append(account["pieces"])
        for name, each in account["read"].items():
            _add(read[name], (each["documents"], each["bytes"]))
        for name, each in json.loads((plan.work / "kept" / f"{rank:05d}.json").read_text("utf-8")).items():
            _add(left[name], each)
    removed: dict[str, dict[str, dict[str, list[int]]]] = {step: {} for step in steps}
    samples: dict[str, list[dict[str, Any]]] = {step: [] for step in steps}
    for step in steps:
        for file in sorted((plan.work / "removed" / step).glob("*.json")):
            account = json.loads(file.read_text("utf-8"))
            samples[step] += account["samples"]
            for name, reasons in account["counts"].items():
                for reason, count in reasons.items():
                    _add(removed[step].setdefault(name, {}).setdefault(reason, [0, 0]), count)
    for name in plan.data:
        gone = [count for step in steps for count in removed[step].get(name, {}).values()]
        for unit, which in (("documents", 0), ("bytes", 1)):
            if read[name][which] != left[name][which] + sum(count[which] for count in gone):
                raise RuntimeError(f"the {unit} of source {name} do not add up: {read[name]} read, {left[name]} left, "
                                   f"{gone} removed")  # fmt: skip
    for step in steps:
        samples[step] = sorted(samples[step], key=lambda sample: sample["order"])[: plan.settings.samples]
        _resolve(plan, step, samples[step], pieces)
    shares = _shares(plan, left)
    return {
        "recipe": {key: value for key, value in plan.recipe().items() if key != "the files"},
        "read": read,
        "skipped": {name: tally.as_dict() for name, tally in tallies(plan).items()},
        "removed": removed,
        "left": left,
        "shares": shares,
        "override": _override(plan, shares),
        "samples": samples,
    }


def _add(total: list[int], more: Sequence[int]) -> None:
    for at, value in enumerate(more):
        total[at] += value


def _resolve(plan: Plan, step: str, samples: list[dict[str, Any]], pieces: list[list[list[Any]]]) -> None:
    """Say of each sample which document stays in its place, where it was a copy."""
    wanted: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:
        if "key" in sample:
            wanted.setdefault(sample["key"], []).append(sample)
    for rank in range(len(plan.tasks) if wanted else 0):
        rows = np.load(plan.work / "originals" / step / f"{rank:05d}.npy")
        for key, number in rows[np.isin(rows[:, 0], np.array(list(wanted), dtype=np.uint64))].tolist():
            at = bisect_right([first for _, first in pieces[rank]], number) - 1
            for sample in wanted[key]:
                sample["copy_of"] = f"{pieces[rank][at][0]}#{number - pieces[rank][at][1] + 1}"
    for sample in samples:
        sample.pop("key", None)
        sample.pop("order")


def _shares(plan: Plan, left: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    """The share of each source in what is left, and in training: by its weight, or as it is where none was given."""
    total = sum(size for _, size in left.values()) or 1
    own = {name: size / total for name, (_, size) in left.items() if size}
    weights = {name: plan.weights[name] for name in own} if plan.weights else own
    sum_of = sum(weights.values()) or 1
    return {name: {"left": own[name], "trained": weights[name] / sum_of} for name in own}


def _override(plan: Plan, shares: dict[str, dict[str, float]]) -> str:
    folder = plan.folder / DOCUMENTS
    if len(plan.data) == 1:
        return f"data=files data.path={folder / next(iter(plan.data))}"
    each = [f"{name}: {{path: {folder / name}, weight: {share['trained']:.4g}}}" for name, share in shares.items()]
    return f"'data.sources={{{', '.join(each)}}}'"


def as_text(found: dict[str, Any]) -> str:
    """Set the account as a table for people."""
    total = [sum(read[at] for read in found["read"].values()) for at in (0, 1)]
    rows = [("read", total, "")]
    for step, by_source in found["removed"].items():
        reasons: dict[str, list[int]] = {}
        for counts in by_source.values():
            for reason, count in counts.items():
                _add(reasons.setdefault(reason, [0, 0]), count)
        removed = [-sum(count[at] for count in reasons.values()) for at in (0, 1)]
        most = sorted(((n, reason) for reason, (n, _) in reasons.items() if reason), reverse=True)
        said = [f"{reason} {n:,}" for n, reason in most[:_REASONS]]
        said += [f"{len(most) - _REASONS} other reasons"] if len(most) > _REASONS else []
        rows.append((step, removed, ", ".join(said)))
    rows.append(("left", [sum(left[at] for left in found["left"].values()) for at in (0, 1)], ""))
    lines = [f"{'':12}{'documents':>16}{'':>9}{'bytes of text':>20}{'':>9}"]
    for name, (documents, size), why in rows:
        shares = [f"{abs(value) / (whole or 1):9.2%}" for value, whole in zip((documents, size), total, strict=True)]
        lines.append(f"{name:12}{documents:>16,}{shares[0]}{size:>20,}{shares[1]}  {why}".rstrip())
    for name, tally in found["skipped"].items():
        lines.append(f"{name}: {Tally(**tally).summary()}")
    for name, share in found["shares"].items() if len(found["left"]) > 1 else ():
        before, after = found["read"][name], found["left"][name]
        times = share["trained"] / share["left"] if share["left"] else 0
        again = "" if abs(times - 1) < 1e-9 else f": {times:.2f} times as often"
        lines.append(
            f"{name}: {after[0]:,} of {before[0]:,} documents are left, {share['left']:.2%} of all that is, and "
            f"{share['trained']:.2%} of the tokens trained on{again}"
        )
    if gone := [name for name in found["left"] if name not in found["shares"]]:
        lines.append(f"nothing is left of {', '.join(gone)}")
    return "\n".join([*lines, *([f"train on it with  {found['override']}"] if found["shares"] else [])])


def samples_text(found: dict[str, Any]) -> str:
    """Set the samples of what was removed as Markdown."""
    lines = ["# What was removed", ""]
    for step, samples in found["samples"].items():
        number = sum(n for counts in found["removed"][step].values() for n, _ in counts.values())
        lines += [f"## {step}: {number:,} documents, {len(samples)} of them drawn evenly", ""]
        for sample in samples:
            why = f": {sample['reason']}" if sample["reason"] else ""
            copy = f", a copy of `{sample['copy_of']}`" if "copy_of" in sample else ""
            lines += [f"`{sample['id']}`, {sample['bytes']:,} bytes{why}{copy}", ""]
            lines += [f"    {line}" for line in sample["head"].splitlines()] + [""]
    return "\n".join(lines)


def read_report(folder: Path) -> dict[str, Any] | None:
    """Read the report of a finished refinement; None where it is not finished."""
    try:
        report: dict[str, Any] = json.loads((folder / REPORT).read_text("utf-8"))
    except FileNotFoundError:
        return None
    return report
