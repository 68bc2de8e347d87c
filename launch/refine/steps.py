"""What datatrove lacks for a refinement: our readers as a step, filters by source and language, and exact accounts.

datatrove runs a step in whatever process and machine its executor chooses, so each keeps what it counts in a file of
its task, written once the task has gone through, and the report adds them up.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.text import ngrams, simplify_text

from conf.train_settings import DataConfig
from launch.refine.languages import WORDS, language_of
from launch.refine.settings import Piece, stamp_of, write_json
from model.problems import BadInput
from train.data.tally import Tally
from train.data.units import documents_of

_HEAD = 400
"""Characters of a sample that the report shows."""
_SHINGLES = 1 << 14
"""N-grams whose hashes are computed at a time: with 112 hashes, 14 MiB instead of gigabytes for a book."""


def num_bytes(document: Document) -> int:
    """Count the bytes of a document's text in UTF-8."""
    return len(text_of(document))


class Read(PipelineStep):
    """Reads the files of a task as a run would read them, with their documents numbered.

    A document's id is ``SOURCE/FILE#n``, the n-th usable one of its file, from 1; of a file that is cut, from a byte
    on, ``SOURCE/FILE@BYTE#n``.

    Args:
        tasks: what each task reads.
        data: the settings of each source.
        folder: where each task's account of what it read goes.
    """

    type = "📖 - READER"
    name = "the corpus, as training reads it"

    def __init__(self, tasks: Sequence[Sequence[Piece]], data: Mapping[str, DataConfig], folder: Path):
        super().__init__()
        self.tasks, self.data, self.folder = tasks, data, folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents of task `rank`.

        Raises:
            BadInput: a file is not as large or as old as it was.
        """
        read: dict[str, dict[str, Any]] = {}
        pieces, tallies = [], []
        number = 0
        for piece in self.tasks[rank]:
            tally = Tally()
            account = read.setdefault(piece.source, {"documents": 0, "bytes": 0})
            pieces.append([piece.id, number])
            _check(piece)
            for at, text in enumerate(documents_of(self.data[piece.source], (piece.part,), tally), 1):
                document = Document(text=text, id=f"{piece.id}#{at}")
                document.metadata = {"source": piece.source, "number": number}
                account["documents"] += 1
                account["bytes"] += num_bytes(document)
                number += 1
                yield document
            _check(piece)
            tallies.append(tally.as_dict())
        write_json(self.folder / f"{rank:05d}.json", {"read": read, "pieces": pieces, "tallies": tallies})


def _check(piece: Piece) -> None:
    path = piece.part.path
    if path is not None and (not path.exists() or stamp_of(path) != piece.stamp):
        raise BadInput([f"{path}: has changed while the corpus was refined; another refine.out, once nobody writes to "
                        "the corpus, would work"])  # fmt: skip


class Removed:
    """Counts what a step removes, by source and reason, and keeps samples; datatrove takes it for a writer.

    Args:
        folder: where the accounts of each step and task go.
        step: the step's name.
        samples: samples to keep.
        seed: decides which: those with the smallest hashes of (seed, id), so that they are drawn evenly over all tasks.
        key: gives what a removed document shares with the one that stays.
    """

    def __init__(self, folder: Path, step: str, samples: int, seed: int, key: Callable[[Document], int] | None = None):
        self.folder, self.step, self.samples, self.seed, self.key = folder, step, samples, seed, key

    def __enter__(self) -> "Removed":
        self.rank: int | None = None
        self.counts: dict[str, dict[str, list[int]]] = {}
        self.kept: list[tuple[int, str, dict[str, Any]]] = []
        return self

    def write(self, document: Document, rank: int = 0) -> None:
        """Account for one removed document."""
        self.rank = rank
        source, reason = document.metadata["source"], document.metadata.get("filter_reason", "")
        count = self.counts.setdefault(source, {}).setdefault(reason, [0, 0])
        size = num_bytes(document)
        count[0] += 1
        count[1] += size
        order = xxhash.xxh64_intdigest(f"{self.seed} {document.id}".encode())
        if not self.samples or (len(self.kept) == self.samples and -order < self.kept[0][0]):
            return
        sample = {"id": document.id, "reason": reason, "bytes": size, "head": document.text[:_HEAD], "order": order}
        if self.key is not None:
            sample["key"] = self.key(document)
        push = heapq.heappush if len(self.kept) < self.samples else heapq.heappushpop
        push(self.kept, (-order, document.id, sample))

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self.rank is not None:
            samples = [sample for _, _, sample in sorted(self.kept, reverse=True)]
            write_json(self.folder / self.step / f"{self.rank:05d}.json", {"counts": self.counts, "samples": samples})


class Kept(PipelineStep):
    """Counts what is left at the end."""

    type = "📊 - STATS"
    name = "what is left"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Pass documents on."""
        counts: dict[str, list[int]] = {}
        for document in data:
            count = counts.setdefault(document.metadata["source"], [0, 0])
            count[0] += 1
            count[1] += num_bytes(document)
            yield document
        write_json(self.folder / f"{rank:05d}.json", counts)


def text_key(document: Document) -> int:
    """Hash a document's text, so that equal texts have equal keys."""
    return xxhash.xxh64_intdigest(text_of(document))


def cluster_key(document: Document) -> int:
    """Name the cluster of near duplicates that a document is in; -1 for none."""
    return int(document.metadata.get("cluster", -1))


def copies_key(document: Document) -> int:
    """Hash the text of a document of which there are copies; -1 for one of which there are none."""
    return text_key(document) if document.metadata.get("duplicate_count") else -1


def text_of(document: Document) -> bytes:
    """Return a document's text as its hash is made of it; datatrove reads the annotation."""
    return document.text.encode("utf-8")


class Clusters(PipelineStep):
    """Tells documents which cluster of near duplicates they are in, as MinHash's third stage has written it.

    datatrove's filter does so only in tasks of which it removes something.
    """

    type = "🫂 - DEDUP"
    name = "clusters of near duplicates"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Pass documents on."""
        file = self.folder / f"{rank:06d}.clusters"
        pairs = np.fromfile(file, dtype="<u4").reshape(-1, 2) if file.exists() else np.empty((0, 2), dtype="<u4")
        cluster = dict(pairs.tolist())
        for at, document in enumerate(data):
            if at in cluster:
                document.metadata["cluster"] = cluster[at]
            yield document


class Originals(PipelineStep):
    """Keeps which documents stay of those that have copies, so that the report can say what a sample is a copy of.

    Args:
        folder: where each task's keys (uint64) and document numbers go.
        key: what a document shares with its copies; below 0 where it has none.
    """

    type = "🫂 - DEDUP"
    name = "which of several copies stays"

    def __init__(self, folder: Path, key: Callable[[Document], int]):
        super().__init__()
        self.folder, self.key = folder, key

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Pass documents on."""
        rows: list[tuple[int, int]] = []
        for document in data:
            if (key := self.key(document)) >= 0:
                rows.append((key, document.metadata["number"]))
            yield document
        self.folder.mkdir(parents=True, exist_ok=True)
        np.save(self.folder / f"{rank:05d}.npy", np.array(rows, dtype=np.uint64).reshape(-1, 2))


class Signature(MinhashDedupSignature):
    """MinHash's signatures, of words in every script, and in bounded memory for documents of any length."""

    def __init__(self, output_folder: str, config: MinhashConfig):
        super().__init__(output_folder, config, language=WORDS)

    def get_shingles(self, text: str) -> np.ndarray:
        """Hash the n-grams of a text's words, as datatrove does, whose call newer versions of xxhash refuse.

        Returns:
            uint64, (number of n-grams, 1).
        """
        words = WORDS.word_tokenize(simplify_text(text, self.config.norm_config))
        hashes = [xxhash.xxh64_intdigest(" ".join(gram).encode("utf-8")) for gram in ngrams(words, self.config.n_grams)]
        return np.array(hashes, dtype=np.uint64).reshape(-1, 1)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """Compute the smallest hash of each function, by bucket, as datatrove does for all n-grams at once."""
        pieces = range(0, len(shingles), _SHINGLES)
        made = [super(Signature, self).get_signature(shingles[at : at + _SHINGLES]) for at in pieces]
        return np.min(np.array(made, dtype=np.uint64), axis=0).tolist()


class Language(BaseFilter):
    """Keeps documents of some languages, and tells the filters after it which a document is in."""

    name = "🌍 language"

    def __init__(self, languages: Sequence[str], score: float, removed: Removed):
        super().__init__(removed)
        self.languages, self.score = frozenset(languages), score

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Judge a document by its likeliest language and that one's probability."""
        language, score = language_of(doc.text)
        doc.metadata["language"] = language
        if language not in self.languages:
            return False, language
        return True if score >= self.score else (False, f"uncertain ({language})")


class Length(BaseFilter):
    """Removes documents that are too short or too long, in characters."""

    name = "📏 length"

    def __init__(self, least: int | None, most: int | None, removed: Removed):
        super().__init__(removed)
        self.least, self.most = least, most

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Judge a document by its length."""
        if self.least is not None and len(doc.text) < self.least:
            return False, "too short"
        return (False, "too long") if self.most is not None and len(doc.text) > self.most else True


class For(BaseFilter):
    """A filter for some documents, that passes all others: sources that are filtered, languages that its rules fit.

    Args:
        inner: the filter.
        spared: sources that pass.
        languages: languages that it is for; None is all. A document of unknown language counts as English.
    """

    def __init__(self, inner: BaseFilter, spared: Sequence[str], languages: Sequence[str] | None = None):
        super().__init__(inner.exclusion_writer)
        self.inner, self.spared, self.languages, self.name = inner, frozenset(spared), languages, inner.name

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Judge a document, if it is one of those."""
        if doc.metadata["source"] in self.spared:
            return True
        if self.languages is not None and doc.metadata.get("language", "en") not in self.languages:
            return True
        return self.inner.filter(doc)


class Lines(JsonlWriter):
    """Writes documents as lines with their text, id, source, and language where that is known."""

    def _default_adapter(self, document: Document) -> dict[str, Any]:
        known = {key: document.metadata[key] for key in ("source", "language") if key in document.metadata}
        return {"text": document.text, "id": document.id, **known}
