"""`deepnarrow roofline`: what prefill and decoding take at least on a device, by key/value heads, and take here."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.clusters import cluster_of
from conf.paths import unwritable
from conf.schema import Config
from launch.describe import settings
from launch.study.roofline.counts import ceilings_of
from launch.study.roofline.findings import MOST_CONTEXT, roofline_findings
from launch.study.roofline.tables import as_text
from launch.trainings.written import say_aside
from model.config import ModelConfig
from model.problems import BadInput
from parallel.plan.cluster import Cluster
from parallel.sharding import problems as tp_problems
from train.strict_json import dumps

DEVICE = "h100"
BATCHES, CONTEXTS = [1, 16, 64], [1024, 4096, 16384, 65536]
MEASURED_BATCHES, MEASURED_CONTEXTS = [1, 8], [256, 1024, 4096]
"""What is measured where neither option says so: seconds on a CPU for a small model."""
RESULTS, TEXT = "roofline.json", "roofline.txt"


def run(options: argparse.Namespace) -> int:
    """Count, measure where that is asked for, print, and write what was asked for.

    Raises:
        BadInput: something that was asked for cannot be; it lists every problem, before anything is measured.
    """
    config = settings(options.overrides)
    kv_heads, batches, contexts, cluster = _judged(options, config)
    wide = 4 if options.dtype == "float32" or (options.dtype is None and not cluster.has_gpus) else 2
    ceilings = ceilings_of(cluster, wide, options.tp, options.achieved)
    found: dict[str, Any] = {
        "preset": config.preset,
        "roofline": roofline_findings(
            config.model, kv_heads, batches or BATCHES, contexts or CONTEXTS, ceilings, options.tp, wide
        ),
        "measured": None,
    }
    texts = [as_text(found["roofline"])]
    if not options.json:
        print(f"{config.preset}: {texts[0]}", flush=True)
    if options.measure:
        found["measured"] = _measured(config.model, kv_heads, batches, contexts)
        texts.append(as_text(found["measured"]))
        if not options.json:
            print(f"\nmeasured on this machine: {texts[1]}", flush=True)
    if options.json:
        print(dumps(found, indent=2))
    if options.out:
        names = _write(found, "\n\n".join(texts), options.out)
        print(f"{options.out}: {', '.join(names)}", file=sys.stderr)
    return 0


def kv_heads_of(model: ModelConfig) -> list[int]:
    """Choose the numbers of key/value heads to compare, most first.

    They are multi-head, the model's own and multi-query; and where its own is one of these, the largest divisor of the
    heads up to 8, as GQA-8 of arXiv 2305.13245.
    """
    heads = {model.n_heads, model.n_kv_heads, 1}
    if model.n_kv_heads in (1, model.n_heads):
        heads |= {max(n for n in range(1, 9) if model.n_heads % n == 0 and n < max(model.n_heads, 2))}
    return sorted(heads, reverse=True)


def _judged(
    options: argparse.Namespace, config: Config
) -> tuple[list[int], list[int] | None, list[int] | None, Cluster]:
    """Read the options: key/value heads, batches and contexts, None where they are not given, and the cluster.

    Raises:
        BadInput: with every problem.
    """
    model = config.model
    problems: list[str] = []
    kv_heads = _numbers("--kv-heads", options.kv_heads, "8,1", problems)
    batches = _numbers("--batches", options.batches, "1,16", problems)
    contexts = _numbers("--contexts", options.contexts, "1024,4096", problems)
    heads = sorted(kv_heads, reverse=True) if kv_heads else kv_heads_of(model)
    sound = []
    for n in heads:
        found = [problem for problem in replace(model, n_kv_heads=n).problems() if "model.n_kv_heads" in problem]
        problems += [problem.replace("model.n_kv_heads", "--kv-heads") for problem in found]
        sound += [] if found else [n]
    at_fault: list[str] = []
    for n in sound:
        found = [text.replace("parallel.tp", "--tp") for text in tp_problems(replace(model, n_kv_heads=n), options.tp)]
        at_fault += [text.replace("model.n_kv_heads", "--kv-heads") for text in found if text not in at_fault]
    problems += dict.fromkeys(at_fault)
    named = options.device or config.cluster or DEVICE
    cluster = None
    try:
        cluster = cluster_of(named)
    except BadInput as error:
        key = "--device=" if options.device else "cluster="
        problems += [problem.replace("--cluster=", key) for problem in error.problems]
    problems += _out_problems(options.out)
    if options.measure and sound:
        from launch.study.roofline.measured import problems as of_measuring

        problems += of_measuring(model, sound)
    if problems or cluster is None:
        raise BadInput(problems)
    return heads, batches, contexts, cluster


def _numbers(option: str, text: str | None, works: str, problems: list[str]) -> list[int] | None:
    """Read whole numbers with commas between them, each once, smallest first; None where there are none."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and 1 <= int(word) <= MOST_CONTEXT for word in words):
        problems.append(
            f"{option}={text}: is no list of whole numbers from 1 to {MOST_CONTEXT:,} with commas between them; "
            f"{option}={works} would work"
        )
        return None
    return sorted({int(word) for word in words})


def _out_problems(out: Path | None) -> list[str]:
    if out is None:
        return []
    if out.exists() and not out.is_dir():
        return [f"--out={out}: is a file, and results are several; a folder would work"]
    return [f"--out={out}: cannot be written; a folder that can be would work"] if unwritable(out) else []


def _measured(
    model: ModelConfig, kv_heads: Sequence[int], batches: list[int] | None, contexts: list[int] | None
) -> dict[str, Any]:
    from launch.bench.common import RandomWeights, device_here
    from launch.study.roofline.measured import measured_findings

    weights = {n: RandomWeights(replace(model, n_kv_heads=n), device=device_here()[0]) for n in kv_heads}
    return measured_findings(weights, batches or MEASURED_BATCHES, contexts or MEASURED_CONTEXTS, say_aside)


def _write(found: dict[str, Any], text: str, out: Path) -> list[str]:
    """Write the results into a folder, which is made if it is not there; return the names of the files."""
    from launch.study.roofline.pictures import draw

    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).write_text(dumps(found, indent=2) + "\n", "utf-8")
    (out / TEXT).write_text(text + "\n", "utf-8")
    pictures = draw(found["roofline"], out)
    if found["measured"] is not None:
        pictures += draw(found["measured"], out, "measured")
    return [RESULTS, TEXT, *(path.name for path in pictures)]
