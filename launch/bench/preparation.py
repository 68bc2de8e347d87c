"""Tokenising a corpus by us and by others, by turns: each in a process of its own, on as many cores as it is given.

All read the same file of JSON lines, use the same tokenizer, write two or four bytes a token with the end token after
each document, and end when all is on disk. What a process imports is no part of its time.
"""

import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conf.train_settings import DataConfig, Source

Preparer = Callable[[Path, Path, Path, int], int]
"""Tokenises: of a file of JSON lines, a tokenizer.json, a folder to write to and a number of cores, the tokens."""


def compare(data: DataConfig, tokenizer: Path, sample_mb: int, rounds: int) -> dict[str, Any]:
    """Tokenise the beginning of a corpus by each preparer, by turns.

    Args:
        data: the corpus.
        tokenizer: the tokenizer.json that all use.
        sample_mb: how much of its text, in MB.
        rounds: how often each does it; medians are reported.

    Returns:
        ``rows``: for each preparer and number of cores the seconds, the seconds of all cores together, and tokens/s of
        a core, by both; ``absent``: who is not installed; ``bytes``: of text.
    """
    cores = len(os.sched_getaffinity(0))
    here = {name: package for name, (_, package) in PREPARERS.items() if importlib.util.find_spec(package) is None}
    ways = [(name, 1) for name in PREPARERS if name not in here]
    ways += [(OURS, cores)] if cores > 1 else []
    found: dict[tuple[str, int], list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="bench-preparation-") as folder:
        corpus = Path(folder, "docs.jsonl")
        num_bytes = _write_sample(data, corpus, sample_mb * 10**6)
        for turn in range(rounds):
            for name, on in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                with tempfile.TemporaryDirectory(dir=folder) as out:
                    found[name, on].append(_run(name, corpus, tokenizer, Path(out), on))
    rows = []
    for (name, on), runs in found.items():
        seconds, cpu = (statistics.median(run[key] for run in runs) for key in ("seconds", "cpu_seconds"))
        tokens = runs[0]["tokens"]
        row = {"name": name, "cores": on, "seconds": seconds, "cpu_seconds": cpu, "tokens": tokens}
        rows.append({**row, "tokens_per_second": tokens / seconds, "tokens_per_cpu_second": tokens / cpu})
    return {"rows": rows, "absent": {name: f"{package} is not installed" for name, package in here.items()},
            "bytes": num_bytes}  # fmt: skip


def _write_sample(data: DataConfig, path: Path, limit: int) -> int:
    from train.data.corpus import Tally, documents

    total = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in documents(data, Tally()):
            file.write(json.dumps({"text": text}) + "\n")
            total += len(text.encode("utf-8"))
            if total >= limit:
                break
    return total


def _run(name: str, corpus: Path, tokenizer: Path, out: Path, cores: int) -> dict[str, float]:
    command = [sys.executable, "-m", __name__, name, str(corpus), str(tokenizer), str(out), str(cores)]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {(done.stderr.strip() or f'exit code {done.returncode}').splitlines()[-1]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _ours(corpus: Path, tokenizer: Path, out: Path, cores: int) -> int:
    from train.data.prepare import prepare

    settings: dict[str, Any] = {"path": str(corpus), "tokenizer": str(tokenizer), "cache_dir": str(out)}
    data = DataConfig(source=Source.files, val_fraction=0, workers=cores, **settings)
    return prepare(data, 1 << 31, 1, progress=False).num_train_tokens


def _datatrove(corpus: Path, tokenizer: Path, out: Path, cores: int) -> int:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    reader = JsonlReader(str(corpus.parent), glob_pattern=corpus.name)
    end = _end_token(tokenizer)
    writer = DocumentTokenizer(str(out / "tokens"), str(tokenizer), eos_token=end, shuffle_documents=False)
    LocalPipelineExecutor([reader, writer], tasks=cores, workers=cores, logging_dir=str(out / "logs")).run()
    return sum(int(file.read_text().splitlines()[1]) for file in (out / "tokens").glob("*.metadata"))


def _megatron(corpus: Path, tokenizer: Path, out: Path, cores: int) -> int:
    """As tools/preprocess_data.py does with one worker: a document at a time, into an IndexedDatasetBuilder."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from train.data.tokenizer import eos_id, load_tokenizer, size

    encoder = load_tokenizer(tokenizer)
    end, tokens = eos_id(encoder, tokenizer), 0
    builder = IndexedDatasetBuilder(str(out / "text.bin"), dtype=DType.optimal_dtype(size(encoder)))
    with open(corpus, encoding="utf-8") as file:
        for line in file:
            ids = [*encoder.encode(json.loads(line)["text"], add_special_tokens=False).ids, end]
            builder.add_document(torch.from_numpy(np.array(ids, np.int64)), [len(ids)])
            tokens += len(ids)
    builder.finalize(str(out / "text.idx"))
    return tokens


def _end_token(tokenizer: Path) -> str:
    from train.data.tokenizer import eos_id, load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return str(loaded.id_to_token(eos_id(loaded, tokenizer)))


OURS = "deepnarrow"
PREPARERS: dict[str, tuple[Preparer, str]] = {
    OURS: (_ours, "train"),
    "datatrove": (_datatrove, "datatrove"),
    "Megatron-LM": (_megatron, "megatron"),
}
"""Who tokenises, and the package that has to be installed for it."""


def main(name: str, corpus: str, tokenizer: str, out: str, cores: str) -> None:
    """Tokenise in this process and those that it starts, and print tokens and seconds as JSON."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
    prepare, _ = PREPARERS[name]
    (Path(out) / "warm").mkdir()
    few = Path(out, "few.jsonl")
    few.write_text('{"text": "a few words"}\n{"text": "and a few more"}\n')
    prepare(few, Path(tokenizer), Path(out, "warm"), 1)  # imports
    before, begin = _cpu_seconds(), time.perf_counter()
    (Path(out) / "out").mkdir()
    tokens = prepare(Path(corpus), Path(tokenizer), Path(out, "out"), int(cores))
    seconds = time.perf_counter() - begin
    print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu_seconds": _cpu_seconds() - before}))


def _cpu_seconds() -> float:
    return sum(of.ru_utime + of.ru_stime for of in map(resource.getrusage, (resource.RUSAGE_SELF,
                                                                            resource.RUSAGE_CHILDREN)))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
