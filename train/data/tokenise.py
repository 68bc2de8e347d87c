"""A corpus tokenised by all who take part: any number of processes, on any number of machines that share the folder.

Under way, a corpus is a folder `FINGERPRINT.partial`: the recipe, the tokenizer, and the shards that are done. Whoever
comes takes what is left, and a shard that is done is never done again, whatever ends before the corpus is. When the
last shard is there, one participant puts them together and gives the folder its name.
"""

import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from conf.train_settings import DataConfig
from model.problems import BadInput
from train.data import cache, corpus
from train.data.build import Job, tokenise_unit
from train.data.claims import Claims
from train.data.segments import DocumentEncoder
from train.data.shards import (
    FOLDER,
    SPLITS,
    Record,
    move_documents,
    read_record,
    record_file,
    shard_name,
)
from train.data.tokenizer_cache import PreparedTokenizer
from train.data.units import joined, units_of
from train.data.workers import default_workers, work_through

INDEX = "index.npy"
"""Tokens and documents of each split of each shard, int64 (shards, 2, 2)."""
_RECIPE = "recipe.json"
_MERGE = "merge"
_POLL, _TRIES = 0.5, 3


def tokenise_corpus(
    data: DataConfig, tokenizer: PreparedTokenizer, description: dict[str, Any], folder: Path, progress: bool
) -> None:
    """Take part in tokenising a corpus until it is finished.

    Args:
        data: the corpus.
        tokenizer: for it.
        description: the recipe, whose fingerprint names the folder.
        folder: where the corpus is when it is finished.
        progress: show a progress bar on stderr.

    Raises:
        BadInput: the corpus has no usable document, tables lack the column, or its files have changed meanwhile.
        OSError: the folder cannot be written; shards that are done stay.
    """
    if problems := corpus.check_tables(data):
        raise BadInput(problems)
    partial = folder.with_name(f"{folder.name}.partial")
    units, tries = units_of(data), 0
    while not folder.exists():
        if tries == _TRIES:
            raise BadInput([f"data.cache_dir={data.cache_dir}: shards are missing or shorter than they were written, "
                            f"{_TRIES} times; a disk that keeps what is written would work"])  # fmt: skip
        _begin(partial, tokenizer, description)
        if folder.exists():  # the last shard was put in while this one looked for the folder
            shutil.rmtree(partial)
            return
        job = Job(data, units, partial, tokenizer.said, tokenizer.dtype, tokenizer.eos_id)
        try:
            with Claims(partial) as claims:
                board = _Board(job, claims, folder)
                _work(job, board, progress)
                if board.merges():
                    tries += 1
                    _finish(job, tokenizer, description, folder)
        except FileNotFoundError:
            if partial.exists():
                raise
            # Another has put the shards together, and the folder has its name, or has found that they are no corpus.


def reopen(folder: Path, damage: str) -> None:
    """Make a finished corpus that is damaged one under way again, of which what is sound is kept."""
    warnings.warn(f"{folder} is damaged ({damage}) and is prepared again", RuntimeWarning, stacklevel=2)
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        os.rename(folder, partial)
    except OSError:
        if partial.exists():  # another does it
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.exists():
            raise
        return
    for file in (cache.META, INDEX, "tokenizer.json", "tokenizer_config.json"):
        (partial / file).unlink(missing_ok=True)
    with ThreadPoolExecutor(default_workers()) as threads:
        list(threads.map(lambda record: _forget_damaged(partial, int(record.stem)), (partial / FOLDER).glob("*.json")))


def _forget_damaged(folder: Path, index: int) -> None:
    found = read_record(folder, index)
    shards = folder / FOLDER
    if found is None or any(cache.checksum(shards / name) != of["blake2b"] for name, of in found[1].items()):
        record_file(folder, index).unlink(missing_ok=True)


def _begin(partial: Path, tokenizer: PreparedTokenizer, description: dict[str, Any]) -> None:
    """Make the folder of a corpus under way, or join it."""
    (partial / FOLDER).mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        try:
            found = cache.read_json(partial / _RECIPE)
        except ValueError:
            found = {}
        if found != description:
            raise BadInput([f"{partial}: has been begun by another recipe than its name says, or was changed; removing "
                            "it would work"])  # fmt: skip
    if not (partial / _RECIPE).exists():
        cache.write_json(partial / _RECIPE, description)
    if not (partial / "tokenizer.json").exists():
        tokenizer.copy_to(partial)


class _Board:
    """What is left to do of a corpus, for the threads of one participant."""

    def __init__(self, job: Job, claims: Claims, final: Path):
        self._job, self._claims, self._final = job, claims, final
        self._lock = threading.Lock()
        self._done: set[int] = set()
        self._sizes = [sum(part.size for part in unit) for unit in job.units]
        number = len(job.units)
        first = int.from_bytes(os.urandom(4), "big") % max(1, number)  # so that participants seldom meet
        self._untried = [*range(first, number), *range(first)]
        self._refresh()
        self._untried = [index for index in self._untried if index not in self._done]

    @property
    def left(self) -> int:
        """Shards that are not done."""
        return len(self._job.units) - len(self._done)

    @property
    def bytes_done(self) -> int:
        """Bytes of the units whose shards are done."""
        with self._lock:
            return sum(self._sizes[index] for index in self._done)

    def next(self) -> int | None:
        """Claim a unit; wait where all are claimed by others that live; None when all shards are done."""
        while True:
            with self._lock:
                while self._untried:
                    if (index := self._untried.pop(0)) not in self._done and self._claims.take(shard_name(index)):
                        return index
                self._refresh()
                if not self.left or self._final.exists():
                    return None
                for index in set(range(len(self._job.units))) - self._done:
                    if self._claims.take_over(shard_name(index)):
                        return index
            time.sleep(min(_POLL * (1 + len(self._job.units) / 1000), 10))  # many look into one folder then

    def finished(self, index: int) -> None:
        """Note that the shard of a unit is done."""
        with self._lock:
            self._claims.done(shard_name(index))
            self._done.add(index)

    def merges(self) -> bool:
        """Tell whether it falls to this participant to put the shards together; wait for another that does."""
        while not self._final.exists() and self._job.folder.exists():
            if self._claims.take(_MERGE) or self._claims.take_over(_MERGE):
                return True
            time.sleep(_POLL)
        return False

    def _refresh(self) -> None:
        """See which shards others have done."""
        names = os.listdir(self._job.folder / FOLDER)
        self._done |= {int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()}


def _work(job: Job, board: _Board, progress: bool) -> None:
    """Tokenise units until all shards are done, by this participant or by others."""
    from tqdm import tqdm

    total = sum(part.size for unit in job.units for part in unit) or None
    workers = max(1, min(job.data.workers or default_workers(), board.left))
    counts = {"documents": 0, "tokens": 0}

    with tqdm(desc="tokenising", total=total, file=sys.stderr, disable=not progress, unit="B", unit_scale=True) as bar:

        def show(read: int, documents: int = 0, tokens: int = 0) -> None:
            done = f"{counts['documents'] + documents:,} documents, {counts['tokens'] + tokens:,} tokens here"
            bar.set_postfix_str(done, refresh=False)
            bar.update(read - bar.n)

        def next_call() -> tuple[Any, ...] | None:
            if (index := board.next()) is None:
                return None
            if workers > 1 or not progress:
                return _tokenise, index
            before = board.bytes_done  # a worker that is this process says more than that it is done
            return _tokenise, index, lambda read, documents, tokens: show(before + read, documents, tokens)

        def take(answer: tuple[int, ...]) -> None:
            index, documents, tokens = answer
            board.finished(index)
            counts["documents"] += documents
            counts["tokens"] += tokens
            show(board.bytes_done)

        show(board.bytes_done)
        with _threads(workers == 1):
            work_through((_Tokeniser, (job,)), workers, next_call, take)
        show(board.bytes_done)


class _Tokeniser:
    """What a worker keeps from one unit to the next."""

    def __init__(self, job: Job):
        self.job = job
        self.encoder: DocumentEncoder = job.encoder()


def _tokenise(state: _Tokeniser, index: int, said: Callable[[int, int, int], None] | None = None) -> tuple[int, ...]:
    record = tokenise_unit(state.job, index, state.encoder, said)
    return index, sum(record.documents.values()), sum(record.tokens.values())


@contextmanager
def _threads(alone: bool) -> Iterator[None]:
    """Let the tokenizer of a process that works alone use all cores, unless the user decided otherwise.

    Afterwards it is told not to: a thread pool does not survive the forks of data workers and checkpoint writers.
    """
    chosen = "TOKENIZERS_PARALLELISM" in os.environ
    if not chosen and alone:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if not chosen:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _finish(job: Job, tokenizer: PreparedTokenizer, description: dict[str, Any], folder: Path) -> None:
    """Put the shards together, and give the folder its name."""
    partial = job.folder
    found = _records(job)
    if found is None:  # cut short since it was written: done again
        return
    if moved := _fill_empty_split(job, [record for record, _ in found]):
        for index in moved:
            again = read_record(partial, index)
            assert again is not None
            found[index] = again
    records = [record for record, _ in found]
    tally = joined(job.units, [record.tally for record in records])
    tokens = {split: sum(record.tokens[split] for record in records) for split in SPLITS}
    which = job.data.path or job.data.name or job.data.source.value  # of a mixture each source is prepared alone
    print(f"corpus {which}: {tally.summary()}; {sum(tokens.values()):,} tokens", file=sys.stderr)
    problems = [] if tally.documents else [corpus.no_documents(job.data, tally)]
    if corpus.fingerprint_inputs(job.data) != description["corpus"]:
        problems.append(f"data.path={job.data.path}: files of the corpus have changed while it was prepared; the same "
                        "command would work once nobody writes to them")  # fmt: skip
    if problems:
        shutil.rmtree(partial)
        raise BadInput(problems)
    np.save(partial / INDEX, np.array([[[r.tokens[s], r.documents[s]] for s in SPLITS] for r in records], np.int64))
    files = {name: cache.describe(partial / name) for name in (INDEX, "tokenizer.json", "tokenizer_config.json")
             if (partial / name).is_file()}  # fmt: skip
    for _, described in found:
        files |= {f"{FOLDER}/{name}": described[name] for name in described}
    for name, of in files.items():
        of.setdefault("changed", (partial / name).stat().st_ctime_ns)
    for leftover in set(os.listdir(partial / FOLDER)) - {name for _, each in found for name in each}:
        if not leftover.endswith(".json"):
            (partial / FOLDER / leftover).unlink(missing_ok=True)
    meta = {
        "dtype": tokenizer.dtype,
        "eos_id": tokenizer.eos_id,
        "tokenizer_size": tokenizer.size,
        "tokens": tokens,
        "documents": {split: sum(record.documents[split] for record in records) for split in SPLITS},
        "tally": tally.as_dict(),
        "description": description,
        "files": files,
    }
    cache.write_json(partial / cache.META, meta)
    for path in (partial / INDEX, partial / FOLDER, partial):
        cache.sync(path)
    for name in ("claims", "alive"):
        shutil.rmtree(partial / name, ignore_errors=True)
    os.rename(partial, folder)
    cache.sync(folder.parent)


def _records(job: Job) -> list[tuple[Record, dict[str, Any]]] | None:
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda index: read_record(job.folder, index), range(len(job.units))))
    for index, each in enumerate(found):
        if each is None:
            record_file(job.folder, index).unlink(missing_ok=True)
            (job.folder / "claims" / shard_name(index)).unlink(missing_ok=True)
    sound = [each for each in found if each is not None]
    return sound if len(sound) == len(found) else None


def _fill_empty_split(job: Job, records: list[Record]) -> list[int]:
    """Hold out the document with the smallest hash where none is held out, or keep the largest where all are.

    Returns:
        The shards that documents were moved in.
    """
    lowest = min(record.lowest.key for record in records)
    highest = max(record.highest.key for record in records)
    of_split = {split: sum(record.documents[split] for record in records if not record.moved) for split in SPLITS}
    moved_to = {record.moved for record in records if record.moved}
    if not job.data.val_fraction or lowest >= highest or not (moved_to or 0 in of_split.values()):
        return []
    target = moved_to.pop() if moved_to else next(split for split in SPLITS if not of_split[split])
    found = []
    for index, record in enumerate(records):
        extreme = record.lowest if target == "val" else record.highest
        if extreme.key == (lowest if target == "val" else highest) and not record.moved:
            move_documents(job.folder, index, record, extreme, job.dtype)
            found.append(index)
    return found
