import gzip
import json
import os
from dataclasses import replace
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.train.data.helpers import local
from train.data import readers, units
from train.data.corpus import Tally, documents
from train.data.units import documents_of, joined, units_of


def read_in_units(data, made=None):
    made = units_of(data) if made is None else made
    texts, tallies = [], []
    for unit in made:
        tallies.append(Tally())
        texts.append(list(documents_of(data, unit, tallies[-1])))
    return texts, joined(made, tallies)


def read_whole(data):
    tally = Tally()
    return list(documents(data, tally)), tally


def same(data, monkeypatch, sizes):
    whole, tally = read_whole(data)
    found = set()
    for size in sizes:
        monkeypatch.setattr(units, "SMALLEST", size)
        texts, together = read_in_units(data)
        assert list(chain.from_iterable(texts)) == whole
        assert replace(together, bytes_read=0) == replace(tally, bytes_read=0)
        assert together.bytes_read == tally.bytes_read
        found.add(len(texts))
    return found


def test_lines_are_read_once_wherever_a_file_is_cut(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": f"{i} " + "é語x" * int(rng.integers(0, 9))}, ensure_ascii=False) for i in range(40)]
    lines[5:5], lines[20:20], lines[30:30] = ["", "{", ""], ['{"text": "\\ud800"}', "  ", "\r"], ['{"body": 1}'] * 5
    (tmp_path / "a.jsonl").write_bytes(("\n".join(lines) + "\n" * 3).encode() + b'{"text": "\xff"}')
    size = (tmp_path / "a.jsonl").stat().st_size
    found = same(local(tmp_path, tmp_path / "a.jsonl"), monkeypatch, [*range(1, 60), 200, size])
    assert min(found) == 1 and max(found) > size // 3


@pytest.mark.parametrize("separator", ["\n\n", "aa", "aba", "|", "\\n---\\n"])
@pytest.mark.parametrize("read", [3, 1 << 20])
def test_separators_that_overlap_themselves_cut_alike(tmp_path, monkeypatch, separator, read):
    monkeypatch.setattr(readers, "_READ", read)
    rng = np.random.default_rng(len(separator))
    for trial in range(12):
        alphabet = ["\n", "\n", "a", "a", "b", "|", "x", "\n---\n", "é"]
        (tmp_path / "a.txt").write_text("".join(rng.choice(alphabet, 80)) + "\n" * (trial % 3))
        data = local(tmp_path, tmp_path / "a.txt", document_separator=separator)
        assert len(same(data, monkeypatch, [1, 2, 3, 5, 8, 13, 40])) > 3


def test_a_file_of_blank_lines_is_one_without_a_row_however_it_is_cut(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("\n" * 100)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n' * 10)
    data = local(tmp_path, tmp_path / "*.jsonl")
    assert len(same(data, monkeypatch, [1, 10, 30, 1000])) > 2
    assert read_whole(data)[1].no_rows == 1


def test_row_groups_are_read_once_and_rows_keep_their_numbers(tmp_path, monkeypatch):
    column = pa.array([None if i % 7 == 3 else f"row {i}" for i in range(60)])
    table = pa.table({"x": range(60), "text": column})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    size = (tmp_path / "a.parquet").stat().st_size
    assert len(same(local(tmp_path, tmp_path / "a.parquet"), monkeypatch, [size // n for n in (1, 2, 5, 9, 40)])) > 3


def test_what_cannot_be_cut_is_a_unit_and_small_files_share_one(tmp_path, monkeypatch):
    line = json.dumps({"text": "x" * 90}) + "\n"
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text("word " * 20)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(os.urandom(500).hex().encode() * 3))
    (tmp_path / "e.jsonl").write_bytes(gzip.compress(os.urandom(500).hex().encode() * 3))  # compressed all the same
    (tmp_path / "f.jsonl").write_text(line * 9)
    (tmp_path / "g.txt").write_text("y" * 900)
    monkeypatch.setattr(units, "SMALLEST", 250)
    made = units_of(local(tmp_path, tmp_path / "*.*"))
    named = [[(part.name, part.span) for part in unit] for unit in made]
    spans = [unit[0][1] for unit in named[4:8]]
    assert named[:4] == [[("a.txt", None), ("b.txt", None)], [("c.txt", None)], [("d.jsonl.gz", None)],
                         [("e.jsonl", None)]]  # fmt: skip
    assert [unit[0][0] for unit in named[4:]] == ["f.jsonl"] * 4 + ["g.txt"] and named[8][0][1] is None
    size = (tmp_path / "f.jsonl").stat().st_size
    assert spans[0][0] == 0 and spans[-1][1] == size and all(a[1] == b[0] for a, b in pairwise(spans))


def test_a_file_that_is_gone_is_put_together_from_what_was_read(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(99)))
    monkeypatch.setattr(units, "SMALLEST", 250)
    data = local(tmp_path, tmp_path / "a.jsonl")
    made = units_of(data)
    tallies = [Tally() for _ in made]
    read = [list(units.documents_of(data, unit, tally)) for unit, tally in zip(made, tallies, strict=True)]
    (tmp_path / "a.jsonl").unlink()
    assert len(made) > 3 and units.joined(made, tallies).documents == sum(map(len, read)) == 99


def test_units_grow_with_the_corpus(tmp_path):
    for tera, number in ((1e-3, 250), (0.1, 4096), (1, 4096), (10, 9300)):
        path = tmp_path / f"{tera}.jsonl"
        path.touch()
        os.truncate(path, int(tera * 1e12))  # holes
        assert len(units_of(local(tmp_path, path))) == pytest.approx(number, rel=0.08)
