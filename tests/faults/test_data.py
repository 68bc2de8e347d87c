"""Data that is not what it says: what is mended or escaped keeps the text, what cannot be is refused by name."""

import gzip
import json
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from conf.train_settings import DataConfig, Source
from conf.validate import Machine
from model.problems import BadInput
from tests.faults.tokenizer_kinds import KINDS
from tests.train.checkpoint import runs
from tests.train.data.helpers import local, problems
from train.data import cache, tokenise
from train.data.corpus import Tally, check, documents
from train.data.packing import ChangedTokens
from train.data.prepare import prepare
from train.preflight import preflight

TRAIN = "shards/000000.train.bin"
BOM = b"\xef\xbb\xbf"


@pytest.fixture
def files(tmp_path):
    return partial(local, tmp_path, val_fraction=0.0)


def read(data: DataConfig) -> tuple[list[str], Tally]:
    tally = Tally()
    return list(documents(data, tally)), tally


# C14: tables


def feature_of_another_version(folder: Path) -> None:
    described = {"info": {"features": {"text": {"dtype": "string", "_type": "Holograms"}}}}
    table = pa.table({"text": ["one", "two"]}).replace_schema_metadata({"huggingface": json.dumps(described)})
    pq.write_table(table, folder / "a.parquet")


def without_rows(folder: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "a.parquet")
    pq.write_table(pa.table({"text": ["one", "two"]}), folder / "b.parquet")
    (folder / "c.jsonl").write_text("\n\n")


def dictionary_and_views(folder: Path) -> None:
    """Each with a row that is not UTF-8, which costs no other."""
    raw = pa.array([b"one", b"\xff"], pa.binary())
    values = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    views = pa.array([b"\xff", b"two"], pa.binary_view()).view(pa.string_view())
    for name, column in ("a", pa.DictionaryArray.from_arrays(pa.array([1, 0]), values)), ("b", views):
        table = pa.table({"x": [1, 2], "text": column})
        with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (feature_of_another_version, "none"),
        (without_rows, "2 files without a row (a.parquet, c.jsonl)"),
        (dictionary_and_views, "2 not UTF-8 (a.arrow:1, b.arrow:1)"),
    ],
    ids=["C14 unknown feature", "C14 no rows", "C14 dictionaries, views, Arrow files"],
)  # fmt: skip
def test_tables_give_the_column_that_is_asked_for(files, tmp_path, write, said):
    write(tmp_path)
    texts, tally = read(files(tmp_path))
    assert texts == ["one", "two"] and tally.summary() == f"2 documents; skipped: {said}"


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (pa.table({"body": ["x"]}), "no such column (1 of 3 files); one of its columns would work: body"),
        (pa.table({"text": [1]}), "that column is int64 (1 of 3 files); a column of strings would work"),
    ],
    ids=["C14 lacking column", "C14 column of numbers"],
)
def test_all_schemas_are_checked_before_the_first_row_is_read(files, tmp_path, last, said, monkeypatch):
    for name in ("a", "b"):
        pq.write_table(pa.table({"text": [name]}), tmp_path / f"{name}.parquet")
    pq.write_table(last, tmp_path / "c.parquet")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("read before all were checked"))
    (problem,) = problems(files(tmp_path))
    assert problem.startswith("data.text_field=text: ") and str(tmp_path / "c.parquet") in problem
    assert problem.endswith(said)


# C15: lines


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.ndjson", b'{"text": "one"}\n{"text": "two"}\n'),
        ("a.jsonlines", b'{"text": "one"}\n{"text": "two"}\n'),
        ("a.jsonl", BOM + b'{"text": "one"}\n' + BOM + b'{"text": "two"}\n'),
        ("a.jsonl", BOM + b'{"text": "one"}' + BOM + b'{"text": "two"}'),
        ("a.jsonl", b'{"text": "one"}{"text": "two"}'),
        ("a.jsonl", b'{"id": ' + b"9" * 5000 + b', "text": "one"}\n{"id": -1' + b"0" * 9000 + b', "text": "two"}'),
        ("a.jsonl", b'{"url": "caf\xe9", "text": "one"}\n{"text": "two"}'),
    ],
    ids=[
        "C15 ndjson", "C15 jsonlines", "C15 marks inside", "C15 marks inside a line", "C15 no newline between",
        "C15 huge integers", "C15 another field is not UTF-8",
    ],
)  # fmt: skip
def test_every_document_is_read(files, tmp_path, name, raw):
    (tmp_path / name).write_bytes(raw)
    texts, tally = read(files(tmp_path / name))
    assert texts == ["one", "two"] and tally.summary() == "2 documents; skipped: none"


def test_marks_inside_joined_text(files, tmp_path):
    (tmp_path / "a.txt").write_bytes(BOM + b"one\n--\n" + BOM + b"two")
    assert read(files(tmp_path / "a.txt", document_separator="\\n--\\n"))[0] == ["one", "two"]


def test_what_save_to_disk_has_written(files, tmp_path):
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    rows = Dataset.from_dict({"id": [1, 2], "text": ["one", "two"]})
    rows.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    (tmp_path / "saved" / "cache-1.arrow").write_bytes(b"of a map")
    DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "both"))
    DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "single"))
    for name in ("saved", "both/train", "single"):
        texts, tally = read(files(tmp_path / name))
        assert texts == ["one", "two"] and tally.summary() == "2 documents; skipped: none"
    (both,) = check(files(tmp_path / "both"))
    assert both.endswith(f"data.path={tmp_path}/both/train or data.path={tmp_path}/both/test would work")
    for name in ("saved", "both"):
        (hub,) = check(DataConfig(source=Source.hub, name=str(tmp_path / name)))
        assert f"data=files data.path={tmp_path / name}" in hub and "network" not in hub


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.ZstdCompressor().compress], ids=["C15 gzip", "C15 zstd"])
def test_compressed_files_under_another_name(files, tmp_path, compress):
    (tmp_path / "a.jsonl").write_bytes(compress(b'{"text": "one"}\n{"text": "two"}'))
    assert read(files(tmp_path / "a.jsonl"))[0] == ["one", "two"]


def lines(bad: int, of: int, what: bytes) -> bytes:
    good = [json.dumps({"text": f"document number {i} is good, and not so short"}).encode() for i in range(of - bad)]
    return b"\n".join([what] * bad + good)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (lines(39, 40, b"no json"), "39 not JSON (a.jsonl:1, a.jsonl:2, a.jsonl:3, ...)"),
        (lines(9, 40, b'{"body": "x"}'), "9 without text (a.jsonl:1, "),
        (lines(9, 40, b'{"text": "caf\xe9"}'), "9 not UTF-8 (a.jsonl:1, "),
    ],
    ids=["C15 not JSON", "C15 without text", "C15 not UTF-8"],
)
@pytest.mark.parametrize("trained", [True, False])
def test_a_corpus_with_too_much_that_is_unusable_is_refused(files, tmp_path, raw, words, trained):
    (tmp_path / "a.jsonl").write_bytes(raw)
    KINDS["byte-level BPE"]().save(str(tmp_path / "tokenizer.json"))
    given = {} if trained else {"tokenizer": str(tmp_path / "tokenizer.json")}
    data = files(tmp_path / "a.jsonl", **given)
    for _ in range(2):  # and from the cache
        (said,) = problems(data, 70_000)
        assert said.startswith("data.max_bad=0.05: ") and words in said
    share = float(said.partition(", or data.max_bad=")[2].split()[0])
    data.max_bad = share
    assert prepare(data, 70_000, 4, progress=False).num_train_tokens
    data.max_bad = 0.05
    assert len(problems(data, 70_000)) == 1


def test_a_damaged_table_counts_by_its_bytes(files, tmp_path):
    pq.write_table(pa.table({"text": [os.urandom(40).hex() for _ in range(200)]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    (said,) = problems(files(tmp_path))
    assert "1 damaged files (b.parquet)" in said and said.startswith("data.max_bad=0.05: ")
    (bad,) = check(files(tmp_path, max_bad=1.5))
    assert bad.startswith("data.max_bad=1.5: not a share")


# C16: prepared tokens


@pytest.fixture
def prepared(files, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(0, 200, b""))
    data = files(tmp_path / "a.jsonl")
    return data, prepare(data, 300, 8, progress=False)


def other_ids(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(40)
        file.write(np.array([60_000], "uint16").tobytes())


def valid_ids(path: Path) -> None:
    np.fromfile(path, "uint16")[::-1].tofile(path)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize(
    ("change", "reason"),
    [(other_ids, f"{TRAIN} is not as it was written"), (valid_ids, f"{TRAIN} is not as it was written"),
     (lambda path: os.truncate(path, 100), f"{TRAIN} has 100 bytes")],
    ids=["C16 ids beyond the vocabulary", "C16 valid ids", "C16 truncated"],
)  # fmt: skip
def test_tokens_that_changed_between_runs_are_prepared_again(prepared, change, reason, small, monkeypatch):
    data, first = prepared
    if not small:
        monkeypatch.setattr(cache, "_SMALL", -1)
    before = (first.folder / TRAIN).read_bytes()
    assert prepare(data, 300, 8, progress=False) == first
    change(first.folder / TRAIN)
    with pytest.warns(RuntimeWarning, match=f"is damaged \\({reason}.* prepared again"):
        assert prepare(data, 300, 8, progress=False) == first
    assert (first.folder / TRAIN).read_bytes() == before


def test_what_was_prepared_is_read_again_where_it_was_touched_or_that_is_asked_for(prepared, monkeypatch):
    data, first = prepared
    monkeypatch.setattr(cache, "_SMALL", -1)
    compared, checksum = [], cache.checksum
    monkeypatch.setattr(cache, "checksum", lambda file: compared.append(file.name) or checksum(file))

    def asked(**how) -> list[str]:
        compared.clear()
        assert prepare(data, 300, 8, progress=False, **how) == first
        return compared.copy()

    assert asked() == [] and set(asked(verify=True)) == {
        Path(TRAIN).name,
        "000000.train.ends",
        "index.npy",
        "tokenizer.json",
    }
    time.sleep(0.01)
    os.utime(first.folder / TRAIN, ns=(0, 0))
    assert asked() == [Path(TRAIN).name] and asked() == []


def test_changed_description_of_what_was_prepared(prepared):
    data, first = prepared
    meta = first.folder / "meta.json"
    meta.write_text(meta.read_text().replace('"eos_id": ', '"eos_id": 1'))
    with pytest.warns(RuntimeWarning, match=r"meta\.json is not as it was written"):
        assert prepare(data, 300, 8, progress=False) == first


def test_a_corpus_that_changes_while_it_is_prepared(files, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(lines(0, 40, b""))
    real = tokenise.tokenise_unit

    def appended(*given):
        with open(tmp_path / "a.jsonl", "a") as file:
            file.write('\n{"text": "more"}')
        return real(*given)

    monkeypatch.setattr(tokenise, "tokenise_unit", appended)
    (said,) = problems(files(tmp_path / "a.jsonl"))
    assert said.startswith(f"data.path={tmp_path}/a.jsonl: files of the corpus have changed while it was prepared; ")
    assert not list((tmp_path / "cache").glob("*/meta.json"))


def test_tokens_that_change_under_a_reader(prepared):
    _, first = prepared
    sequences = first.train(8)
    other_ids(first.folder / TRAIN)
    with pytest.raises(ChangedTokens, match=r"train\.bin, token 20: holds id 60000 in sequence 2, beyond"):
        sequences[2]
    os.truncate(first.folder / TRAIN, 100)
    for opened in (sequences, first.train(8)):
        with pytest.raises(ChangedTokens, match=rf"ends after 50 of {first.num_train_tokens:,} tokens.* prepares"):
            opened[20]


def test_tokens_cut_short_under_a_run_end_it_with_a_reason(overrides, tmp_path):
    asked = [*overrides, f"data.cache_dir={tmp_path / 'cache'}", "train.max_steps=100000", "checkpoint.enabled=false"]
    ranks = runs.start(tmp_path / "run", 1, *asked)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    (tokens,) = (tmp_path / "cache").glob(f"*/{TRAIN}")
    os.truncate(tokens, 1000)
    assert ranks.wait(60) == [1]
    assert f"{tokens}: ends after 500 of " in (tmp_path / "run" / "rank0.log").read_text()


# C17: lengths


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["train.max_steps=30", "train.global_batch=2048", "train.total_tokens=1e9"], "train.max_steps=30: "),
        (["train.max_steps=1", "train.global_batch=65536"], "train.max_steps=1: "),
        (["train.total_tokens=1e8"], "train.total_tokens=1e+08: "),
    ],
    ids=["C17 epochs", "C17 a batch larger than the corpus", "C17 epochs of the whole run"],
)
def test_epochs_are_said(overrides, tmp_path, changes, said):
    asked = [*overrides, "schedule.warmup_steps=0", *changes, f"hydra.run.dir={tmp_path}"]
    run = preflight(asked, machine=Machine(gpus=0))
    (warning,) = run.warnings
    assert (
        warning.startswith(said)
        and f"the corpus has {len(next(iter(run.data.by_name.values())).train(32)):,} of train.seq_len=32" in warning
    )
    steps = int(warning.split("since ")[1].split(" steps")[0].replace(",", ""))
    assert (
        f" {steps * run.config.train.global_batch / len(next(iter(run.data.by_name.values())).train(32)):.1f} epochs"
        in warning
    )


def test_a_warm_up_longer_than_the_run_is_said(overrides, tmp_path):
    asked = [*overrides, "train.max_steps=4", f"hydra.run.dir={tmp_path}"]
    (warning,) = preflight([*asked, "schedule.warmup_steps=2000"], machine=Machine(gpus=0)).warnings
    assert warning.startswith("schedule.warmup_steps=2000: longer than the run (train.max_steps=4)")
    assert "0.2% of optimizer.lr" in warning
    assert preflight([*asked, "schedule.warmup_steps=4"], machine=Machine(gpus=0)).warnings == []


def test_a_checkpoint_past_the_end_is_said(overrides, tmp_path):
    runs.finish(tmp_path / "run", 1, *overrides, "train.max_steps=4")
    own = [*overrides, "train.max_steps=2", f"hydra.run.dir={tmp_path / 'run'}"]
    assert preflight(own, machine=Machine(gpus=0)).complete.startswith(f"{tmp_path / 'run'}: complete, 4 of 2 steps")
    (tmp_path / "run" / "summary.json").unlink()
    assert preflight(own, machine=Machine(gpus=0)).complete.startswith(f"{tmp_path / 'run'}: complete, 4 of 2 steps")
    for path in (tmp_path / "run", runs.saved(tmp_path / "run", 4)):
        with pytest.raises(BadInput) as caught:
            preflight([*own, f"resume={path}", f"hydra.run.dir={tmp_path / 'other'}"], machine=Machine(gpus=0))
        (said,) = caught.value.problems
        assert "is of step 4 and the run ends with step 2, so that nothing is left to train" in said
    assert preflight([*own, "train.max_steps=5", f"resume={path}", f"hydra.run.dir={tmp_path / 'other'}"])
