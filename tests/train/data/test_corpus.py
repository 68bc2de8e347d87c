import gzip
import json
import os
import random
import sysconfig
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from conf.train_settings import DataConfig, Source
from model.problems import BadInput
from train.data.corpus import Tally, check, documents, fingerprint_inputs, list_files

LINES = [
    json.dumps({"text": "first"}).encode(),
    b'{"text": "not \xff utf8"}',
    b'{"text": "broken',
    b'{"other": "no text"}',
    b'{"text": 7}',
    b"[1, 2]",
    json.dumps({"text": " \n"}).encode(),
    b'{"text": "half a pair \\ud800"}',
    b"",
    json.dumps({"text": "last 語"}).encode(),
]


def read(data: DataConfig) -> tuple[list[str], Tally]:
    tally = Tally()
    return list(documents(data, tally)), tally


@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz", "jsonl.zst"])
def test_a_bad_line_costs_no_other(tmp_path, files_config, ending):
    path = tmp_path / f"a.{ending}"
    raw = b"\xef\xbb\xbf" + b"\n".join(LINES)
    compress = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}.get(ending[-3:].strip("."), bytes)
    path.write_bytes(compress(raw))
    texts, tally = read(files_config(path))
    assert texts == ["first", "last 語"]
    counts = (tally.documents, tally.bad_utf8, tally.bad_json, tally.no_text, tally.empty, tally.unreadable)
    assert counts == (2, 2, 1, 3, 1, 0)
    assert tally.places["bad_json"] == [f"a.{ending}:3"]
    assert tally.bytes_read == path.stat().st_size
    assert f"3 without text (a.{ending}:4, a.{ending}:5, a.{ending}:6)" in tally.summary()


def test_places_are_few_while_counts_are_full(tmp_path, files_config):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n' + "{\n" * 9)
    _, tally = read(files_config(path))
    assert tally.bad_json == 9 and len(tally.places["bad_json"]) == 3
    assert "9 not JSON (a.jsonl:2, a.jsonl:3, a.jsonl:4, ...)" in tally.summary()


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_truncated_file_costs_only_its_end(tmp_path, files_config, ending):
    # Incompressible, so that there are many blocks.
    lines = [json.dumps({"text": f"{i} {os.urandom(600).hex()}"}).encode() for i in range(1000)]
    whole = b"\n".join(lines)
    packed = gzip.compress(whole) if ending == "gz" else zstandard.ZstdCompressor().compress(whole)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / f"a.jsonl.{ending}").write_bytes(packed[: len(packed) * 3 // 4])
    (tmp_path / "c" / "b.jsonl").write_text('{"text": "the next file"}')
    texts, tally = read(files_config(tmp_path / "c"))
    assert (tally.unreadable, tally.bad_json) == (1, 0)
    assert 500 < len(texts) < 800 and texts[-1] == "the next file"
    assert texts[:-1] == [json.loads(line)["text"] for line in lines[: len(texts) - 1]]


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_damage_inside_is_counted_and_members_are_joined(tmp_path, files_config, ending):
    compress = gzip.compress if ending == "gz" else zstandard.ZstdCompressor().compress
    (tmp_path / "two.jsonl").with_suffix(f".jsonl.{ending}").write_bytes(
        compress(b'{"text": "one"}\n') + compress(b'{"text": "two"}\n')
    )
    assert read(files_config(tmp_path / f"two.jsonl.{ending}"))[0] == ["one", "two"]
    (tmp_path / f"bad.jsonl.{ending}").write_bytes(compress(b'{"text": "one"}\n') + b"this is no member")
    texts, tally = read(files_config(tmp_path / f"bad.jsonl.{ending}"))
    assert texts == ["one"] and tally.places["unreadable"] == [f"bad.jsonl.{ending}"]


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_what_stands_before_damage_is_read(tmp_path, files_config, ending):
    draw = random.Random(0)
    texts = [f"{i} {draw.randbytes(300).hex()}" for i in range(1000)]
    whole = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if ending == "gz":
        stream = zlib.compressobj(wbits=31)
        packed = stream.compress(whole) + stream.flush(zlib.Z_FULL_FLUSH) + b"\x07"  # a block of no known type
    else:
        stream = zstandard.ZstdCompressor().compressobj()
        packed = stream.compress(whole) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) + b"\x06\x00\x00"  # likewise
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(packed + bytes(5000))
    found, tally = read(files_config(path))
    assert (tally.unreadable, tally.bad_json, tally.bad_utf8) == (1, 0, 0)
    # All but the last block, of at most 128 KiB, or in gzip the last kibibyte fed.
    assert found == texts[: len(found)] and len(found) > (980 if ending == "gz" else 750)


def test_gzip_may_be_padded_with_zeros(tmp_path, files_config):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text") + bytes(3000))
    assert read(files_config(tmp_path / "a.txt.gz")) == (["text"], Tally(documents=1, bytes_read=3024))


def test_a_truncated_text_ends_before_a_broken_character(tmp_path, files_config):
    packed = zstandard.ZstdCompressor().compress(b"x")  # a whole frame, then one without its end
    cut = zstandard.ZstdCompressor().compressobj()
    frame = cut.compress("語".encode() * 100 + "語".encode()[:2]) + cut.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / "a.txt.zst").write_bytes(packed + frame)
    texts, tally = read(files_config(tmp_path / "a.txt.zst"))
    assert texts == ["x" + "語" * 100]
    assert (tally.unreadable, tally.bad_utf8) == (1, 0)


def test_parquet(tmp_path, files_config):
    raw = pa.array([b"first", b"\xff\xfe", None, b" ", b"last"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 5, raw.buffers())
    (tmp_path / "c").mkdir()
    pq.write_table(pa.table({"id": range(5), "body": column}), tmp_path / "c" / "a[1].parquet")
    (tmp_path / "c" / "b.parquet").write_bytes(b"PAR1 no")
    pq.write_table(pa.table({"body": ["after"]}), tmp_path / "c" / "c.parquet")
    texts, tally = read(files_config(tmp_path / "c", text_field="body"))
    assert texts == ["first", "last", "after"]
    assert (tally.bad_utf8, tally.no_text, tally.empty, tally.unreadable) == (1, 1, 1, 1)
    assert tally.places["bad_utf8"] == ["a[1].parquet:2"]


def test_parquet_with_a_damaged_page_keeps_what_was_before(tmp_path, files_config):
    path = tmp_path / "a.parquet"
    texts = [os.urandom(200).hex() for _ in range(1000)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, compression="zstd", use_dictionary=False)
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 30_000] = bytes(30_000)
    path.write_bytes(raw)
    found, tally = read(files_config(path))
    assert 0 < len(found) < 600 and found == texts[: len(found)]
    assert tally.unreadable == 1


def test_parquet_without_the_column_is_a_wrong_setting(tmp_path, files_config):
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"^data\.text_field=text: .*no such column.*: id, body$"):
        read(files_config(tmp_path))


def test_text_folder(tmp_path, files_config):
    root = tmp_path / "c"
    (root / "sub").mkdir(parents=True)
    (root / "b.txt").write_bytes(b"caf\xe9")
    (root / "c.md").write_text("  \n")
    (root / "a.txt").write_text("alpha\n")
    (root / "sub" / "d.txt.gz").write_bytes(gzip.compress(b"delta"))
    (root / ".hidden").write_text("no")
    (root / "loop").symlink_to(root)
    data = files_config(root, cache_dir=str(root / "cache"))
    (root / "cache").mkdir()
    (root / "cache" / "train.bin").write_text("no corpus")
    texts, tally = read(data)
    assert texts == ["alpha\n", "delta"]
    assert (tally.bad_utf8, tally.empty) == (1, 1) and tally.places["bad_utf8"] == ["b.txt"]


def test_glob(tmp_path, files_config):
    for name in ("x/a.txt", "y/b.txt", "y/c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(files_config(tmp_path / "*" / "*.txt"))[0] == ["x/a.txt", "y/b.txt"]
    assert [n for n, _ in list_files(files_config(tmp_path / "**" / "*.md"))] == ["y/c.md"]


def test_separator(tmp_path, files_config, monkeypatch):
    monkeypatch.setattr("train.data.readers._READ", 5)  # separators fall across blocks
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\nline<|doc|>two \xff<|doc|>\n<|doc|><three>|><|doc|>\n")
    texts, tally = read(files_config(path, document_separator="<|doc|>"))
    assert texts == ["one\nline", "<three>|>"]
    assert tally.places == {"bad_utf8": ["a.txt:2"], "empty": ["a.txt:2"]}


def test_stdlib():
    names = [name for name, _ in list_files(DataConfig())]
    assert "os.py" in names and "json/decoder.py" in names and len(names) > 500
    assert names == sorted(names)
    assert not any("site-packages" in n or "__pycache__" in n or not n.endswith(".py") for n in names)
    # Tables that programs have made teach a small model box-drawing characters.
    root = Path(sysconfig.get_path("stdlib"))
    assert (root / "encodings" / "cp437.py").exists() and (root / "pydoc_data" / "topics.py").exists()
    assert not any(n.startswith(("encodings/", "pydoc_data/")) for n in names)
    texts = documents(DataConfig(), tally := Tally())
    first = next(texts)
    assert first == Path(sysconfig.get_path("stdlib"), names[0]).read_bytes().decode() and tally.documents == 1


@pytest.fixture
def hub(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, **options):
        asked.append((name, subset, options))
        if name == "no/such":
            raise FileNotFoundError("not on the hub")
        rows = [{"text": "one", "id": 1}, {"text": None, "id": 2}, {"text": "two", "id": 3}]
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub(hub):
    texts, tally = read(DataConfig(source=Source.hub, name="a/b", subset="s", split="dev", revision="r"))
    assert texts == ["one", "two"] and tally.places == {"no_text": ["a/b:1"]}
    assert hub == [("a/b", "s", {"split": "dev", "revision": "r", "streaming": True})]


def test_hub_mistakes(hub):
    with pytest.raises(BadInput, match=r"^data\.name=no/such: cannot be opened \(FileNotFoundError: not on the hub\)"):
        read(DataConfig(source=Source.hub, name="no/such"))
    with pytest.raises(BadInput, match=r"^data\.text_field=body: a/b has no such column; .*: text, id$"):
        read(DataConfig(source=Source.hub, name="a/b", text_field="body"))


def test_check_finds_nothing_wrong(jsonl, files_config):
    assert check(files_config(jsonl)) == [] and check(DataConfig()) == []
    assert check(DataConfig(source=Source.hub, name="a/b")) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"path": "docs.jsnl"}, "no such file or folder; {root}/docs.jsonl would work"),
        ({"path": "nowhere/docs.jsonl"}, "no such file or folder; {root} exists, the rest does not; a path"),
        ({"path": "*.parquet"}, "the pattern matches no file; a file, a folder"),
        ({"path": "folder"}, "the folder holds no file; a file, a folder with files or a glob such as {root}/folder/"),
        ({"path": "empty*.txt"}, "all 2 files are empty; files with text"),
    ],
)
def test_check_path(tmp_path, files_config, changes, said):
    for name in ("docs.jsonl", "empty1.txt", "empty2.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    path = tmp_path / changes["path"]
    (problem,) = check(files_config(path))
    assert problem.startswith(f"data.path={path}: {said.format(root=tmp_path)}") and problem.endswith("would work")


def test_check_unreadable(jsonl, files_config, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != jsonl)
    (problem,) = check(files_config(jsonl))
    assert problem.startswith(f"data.path={jsonl}: no permission to read {jsonl}; chmod")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": Source.files}, "data.path=null: data.source=files needs one"),
        ({"source": Source.hub}, "data.name=null: data.source=hub needs one"),
        ({"path": "/x"}, "data.path=/x: data.source=stdlib does not read it; data.source=files would"),
        ({"name": "a/b"}, "data.name=a/b: data.source=stdlib does not read it; data.source=hub would"),
        ({"val_fraction": 1.0}, "data.val_fraction=1.0: not a share"),
        ({"val_fraction": -0.1}, "data.val_fraction=-0.1: not a share"),
        ({"tokenizer_sample_mb": 0}, "data.tokenizer_sample_mb=0: a tokenizer cannot be trained on no text"),
        ({"tokenizer_vocab_size": 270}, "data.tokenizer_vocab_size=270: byte-level BPE needs 256 bytes and 15"),
        ({"document_separator": ""}, "data.document_separator='': nothing to cut at"),
    ],
)
def test_check_settings(changes, said):
    (problem,) = check(DataConfig(**changes))
    assert problem.startswith(said) and ("; " in problem)


def test_check_tokenizer(tmp_path):
    (tmp_path / "tokeniser.json").touch()
    (problem,) = check(DataConfig(tokenizer=str(tmp_path / "tokenizer.json")))
    assert f"no such file or folder; {tmp_path}/tokeniser.json would work" in problem
    (problem,) = check(DataConfig(tokenizer=str(tmp_path)))
    assert problem.startswith(f"data.tokenizer={tmp_path}: the folder has no tokenizer.json")


def test_check_says_everything():
    assert len(check(DataConfig(source=Source.files, name="x", val_fraction=2, tokenizer="/nowhere/t.json"))) == 4


def test_fingerprint_inputs(jsonl, files_config):
    data = files_config(jsonl.parent)
    before = fingerprint_inputs(data)
    assert json.loads(json.dumps(before)) == before
    stat = jsonl.stat()
    assert before["files"] == [["docs.jsonl", stat.st_size, stat.st_mtime_ns]]
    moved = jsonl.parent.rename(jsonl.parent.with_name("elsewhere"))
    assert fingerprint_inputs(files_config(moved)) == before
    os.utime(moved / "docs.jsonl", ns=(0, stat.st_mtime_ns + 1))
    assert fingerprint_inputs(files_config(moved)) != before


def test_fingerprint_inputs_of_the_hub_and_the_library():
    hub = {"source": Source.hub, "name": "a"}
    different = [{}, {"name": "b"}, {"subset": "s"}, {"split": "dev"}, {"revision": "r"}, {"text_field": "t"}]
    assert len({json.dumps(fingerprint_inputs(DataConfig(**{**hub, **d}))) for d in different}) == len(different)
    library = fingerprint_inputs(DataConfig())
    assert library["python"].split()[1] == ".".join(map(str, os.sys.version_info[:3]))
    assert library == fingerprint_inputs(DataConfig(text_field="t", document_separator="x"))


def test_a_separator_may_be_written_as_on_a_command_line(tmp_path, files_config):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\tthree")
    assert read(files_config(path, document_separator="\\n\\n"))[0] == ["one", "two\tthree"]
    assert read(files_config(path, document_separator="\\t"))[0] == ["one\n\ntwo", "three"]
