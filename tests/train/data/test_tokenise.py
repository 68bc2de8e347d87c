"""A corpus under way: who takes part, who is killed, a disk that is full, and what they leave."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from model.problems import BadInput
from tests.train.data.helpers import VOCAB, corpus_texts, problems, ready, texts_of, tokens_of
from train.data import build, cache, claims, shards, tokenise, units, workers
from train.data import prepare as prepare_
from train.data.shards import SPLITS, token_file

ROOT = Path(__file__).parents[3]


@pytest.fixture
def corpus(tmp_path):
    """Three files, of which one is cut into many units."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, number in (("a", 3), ("b", 300), ("c", 5)):
        texts = (f"{name} {i} and {i * i}\n" * (1 + i % 3) for i in range(number))
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


@pytest.fixture
def settings(corpus, files_config, folder_with_tokenizer):
    """Settings for the corpus in a cache of its own, by name."""

    def made(name, **changes):
        return files_config(
            corpus, tokenizer=str(folder_with_tokenizer), cache_dir=f"{corpus.parent}/{name}", **changes
        )

    return made


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(units, "SMALLEST", 700)


def start(data, code: str = "", workers: int = 1) -> subprocess.Popen:
    """A process that prepares `data`, after `code`."""
    given = {key: getattr(data, key) for key in ("path", "cache_dir", "tokenizer", "val_fraction")}
    program = f"""
import os, signal, sys, time
from conf.train_settings import DataConfig, Source
from train.data import build, claims, shards, tokenise, units, workers
from train.data.prepare import prepare
units.SMALLEST = 700
{textwrap.dedent(code)}
data = DataConfig(source=Source.files, workers={workers}, **{given!r})
print(prepare(data, {VOCAB}, 8, progress=False).fingerprint)
"""
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE)


def content(folder: Path) -> dict[str, bytes]:
    """The files of a corpus; meta.json without the times at which they were written."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    meta = json.loads(found.pop("meta.json"))
    for of in meta["files"].values():
        of.pop("changed")
    meta.pop("checksum")
    return {**found, "meta.json": json.dumps(meta).encode()}


def partial_of(data) -> Path:
    (found,) = Path(data.cache_dir).glob("*.partial")
    return found


def test_shards_have_the_documents_in_the_order_of_the_corpus(settings, corpus):
    prepared = ready(settings("cache", workers=1))
    number = len(list(prepared.folder.glob("shards/*.json")))
    assert number > 12 and prepared.tally["documents"] == 308
    held_out = set(texts_of(prepared, "val"))
    texts = [text for name in "abc" for text in corpus_texts(corpus / f"{name}.jsonl")]
    assert texts_of(prepared, "train") == [text for text in texts if text not in held_out] and 30 < len(held_out) < 90
    assert texts_of(prepared, "val") == [text for text in texts if text in held_out]


def test_however_many_take_part_and_however_often_they_are_killed_the_bytes_are_the_same(settings):
    alone = content(ready(settings("alone", workers=1)).folder)
    # Four at once, of which one has two processes of its own.
    together = settings("together")
    slow = "tokenise.tokenise_unit = (lambda real: lambda *a: (time.sleep(0.02), real(*a))[1])(tokenise.tokenise_unit)"
    everyone = [start(together, slow, workers=1 + (i == 0)) for i in range(3)]
    # One after another, each killed in the middle of its third unit.
    killed = settings("killed")
    dies = """
    def dying(job, index, *rest, real=build.tokenise_unit, done=[]):
        done.append(index)
        if len(done) == 3:
            shards.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        return real(job, index, *rest)
    tokenise.tokenise_unit = dying
    """
    done = []
    for _ in range(2):
        process = start(killed, dies)
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL
        done.append({path.name: path.stat().st_mtime_ns for path in partial_of(killed).glob("shards/*.json")})
    assert [len(each) for each in done] == [2, 4] and done[0].items() <= done[1].items()
    begun = time.monotonic()
    last = ready(killed)  # the dead were on this machine: nothing is waited for
    assert time.monotonic() - begun < claims.PATIENCE / 2
    now = {path.name: path.stat().st_mtime_ns for path in last.folder.glob("shards/*.json")}
    assert done[1].items() <= now.items() and content(last.folder) == alone
    prints = {process.communicate(timeout=120)[0] for process in everyone}
    assert [process.returncode for process in everyone] == [0, 0, 0] and prints == {last.fingerprint + "\n"}
    assert content(Path(together.cache_dir, last.fingerprint)) == alone
    assert not list(Path(together.cache_dir).glob("*.partial"))


def test_workers_end_with_the_process_that_started_them(settings, tmp_path):
    code = f"""
    class Noted(workers.Worker):
        def __init__(self, state):
            super().__init__((time.sleep, (60,)))  # at work when the process that started it is killed
            open({str(tmp_path / "pids")!r}, "a").write(f"{{self._process.pid}}\\n")
    workers.Worker = Noted
    """
    process = start(settings("cache"), code, workers=2)
    deadline = time.monotonic() + 60
    while len(pids := (tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else []) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    while any(alive(int(pid)) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(int(pid)) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_worker_that_is_killed_is_said(settings):
    data = settings("cache", workers=2)
    job = build.Job(data, units.units_of(data), Path("nowhere"), "", "uint16", 0)
    said = r"was killed by SIGKILL; where memory is short, a smaller data\.workers would work"
    with workers.Worker((os.getpid, ())) as worker, pytest.raises(workers.WorkerDied, match=said):
        assert worker.call(os.kill, signal.SIGKILL)
    with workers.Worker((tokenise._Tokeniser, (job,))) as worker, pytest.raises(BadInput) as caught:
        worker.call(tokenise._tokenise, 0)
    assert [said.partition(": ")[0] for said in caught.value.problems] == ["data.tokenizer=nowhere/tokenizer.json"]


def test_one_worker_says_how_far_it_is_within_a_unit(settings, monkeypatch):
    import tqdm

    said = []

    class Bar(tqdm.tqdm):
        def set_postfix_str(self, text="", refresh=True):
            said.append(text)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(units, "SMALLEST", 1 << 20)
    prepare_.prepare(settings("cache", workers=1), VOCAB, 8)
    tokens = [int(text.split()[2].replace(",", "")) for text in said]
    assert tokens == sorted(tokens) and len(set(tokens)) == 1 + 308 and said[-1].startswith("308 documents")


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_without_a_document_gets_one_with_all_its_copies(settings, corpus, split, monkeypatch):
    lines = (corpus / "b.jsonl").read_text()
    (corpus / "d.jsonl").write_text(lines)  # copies in other shards
    data = settings("cache", workers=1, val_fraction=1e-30 if split == "val" else 1 - 1e-15)
    real, moved = shards.write_json, []

    def interrupted(file, record):
        if record.get("moved"):
            moved.append(file)
            if len(moved) == 2:
                raise KeyboardInterrupt
        real(file, record)

    monkeypatch.setattr(shards, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ready(data)
    assert not list(Path(data.cache_dir).glob("*/meta.json"))
    prepared = ready(data)
    other = "train" if split == "val" else "val"
    texts = [text for name in "abcd" for text in corpus_texts(corpus / f"{name}.jsonl")]
    pick = min if split == "val" else max
    chosen = pick(texts, key=lambda text: build.document_hash(text, "split"))
    assert texts_of(prepared, split) == [chosen] * 2 and texts.count(chosen) == 2
    assert texts_of(prepared, other) == [text for text in texts if text != chosen]


def test_a_full_disk_costs_the_shards_under_way(settings, monkeypatch):
    data = settings("cache", workers=1)
    real, written = shards._File.write, []

    def full(self, block):
        written.append(len(block))
        if len(written) == 400:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, block)

    monkeypatch.setattr(shards._File, "write", full)
    (said,) = problems(data)
    assert "cannot be written ([Errno 28] No space left on device)" in said
    assert said.endswith("a folder with room in it would work, and what is done already stays")
    partial = partial_of(data)
    done = {path.name for path in partial.glob("shards/*.json")}
    assert len(done) > 3 and not [path for path in partial.glob("shards/*") if path.name.count(".") > 2]
    assert {path.name for path in partial.glob("claims/*")} == {name[:-5] for name in done}
    taken, unit = [], tokenise.tokenise_unit
    monkeypatch.setattr(
        tokenise, "tokenise_unit", lambda job, index, *rest: taken.append(index) or unit(job, index, *rest)
    )
    prepared = ready(data)
    assert {f"{index:06}.json" for index in taken}.isdisjoint(done)
    assert len(taken) + len(done) == len(list(prepared.folder.glob("shards/*.json")))


def test_a_folder_of_another_recipe_is_refused(settings, monkeypatch):
    data = settings("cache", workers=1)
    monkeypatch.setattr(tokenise, "_work", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ready(data)
    monkeypatch.undo()
    partial = partial_of(data)
    cache.write_json(partial / "recipe.json", {"format": 0})
    (said,) = problems(data)
    assert (
        said
        == f"{partial}: has been begun by another recipe than its name says, or was changed; removing it would work"
    )
    assert (partial / "recipe.json").exists()


def test_of_a_damaged_corpus_only_what_is_damaged_is_done_again(settings, monkeypatch):
    data = settings("cache", workers=1)
    prepared = ready(data)
    before, tokens = content(prepared.folder), tokens_of(prepared, "train")
    np.array([1], "uint16").tofile(token_file(prepared.folder, 4, "train"))
    ids = np.fromfile(token_file(prepared.folder, 6, "train"), "uint16")
    ids[::-1].tofile(token_file(prepared.folder, 6, "train"))
    taken, unit = [], tokenise.tokenise_unit
    monkeypatch.setattr(
        tokenise, "tokenise_unit", lambda job, index, *rest: taken.append(index) or unit(job, index, *rest)
    )
    with pytest.warns(RuntimeWarning, match=r"000004\.train\.bin has 2 bytes.* is prepared again"):
        assert ready(data) == prepared
    assert sorted(taken) == [4, 6] and content(prepared.folder) == before
    assert np.array_equal(tokens_of(prepared, "train"), tokens)


def test_a_disk_that_does_not_keep_what_is_written_is_said(settings, monkeypatch):
    data = settings("cache", workers=1)
    monkeypatch.setattr(tokenise, "read_record", lambda *_: None)
    (said,) = problems(data)
    assert said.startswith(f"data.cache_dir={data.cache_dir}: ") and said.endswith("keeps what is written would work")
    monkeypatch.undo()
    monkeypatch.setattr(prepare_, "tokenise_corpus", lambda *_: None)
    (said,) = problems(data)
    assert "is damaged (" in said and said.endswith("keeps what is written would work")


def test_a_shard_cut_short_before_the_end_is_done_again(settings, monkeypatch):
    data = settings("cache", workers=1)
    real = tokenise._finish

    def cut_short(job, *rest):
        monkeypatch.setattr(tokenise, "_finish", real)
        os.truncate(token_file(job.folder, 3, "train"), 2)
        return real(job, *rest)

    monkeypatch.setattr(tokenise, "_finish", cut_short)
    assert content(ready(data).folder) == content(ready(settings("other", workers=1)).folder)
