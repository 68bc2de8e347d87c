"""Token files as other programs write them; the writers here follow their formats byte for byte."""

import json
import os
import struct
from functools import partial
from itertools import chain
from pathlib import Path

import fsspec
import numpy as np
import pytest

from conf.train_settings import DataConfig, Source
from model.problems import BadInput
from tests.train.data.helpers import problems, ready
from train.data.formats import blocks
from train.data.formats.blocks import BLOCK, KeptBytes
from train.data.formats.remote import RemotePath, list_remote
from train.data.packing import ChangedTokens
from train.data.prepare import prepare
from train.data.tokenizer import eos_id, load_tokenizer


def documents_of(number: int, eos: int | None = None, seed: int = 0, high: int = 256) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [
        [*draw.integers(0, high, draw.integers(1, 30)).tolist(), *([] if eos is None else [eos])] for _ in range(number)
    ]


def megatron(prefix: Path, documents, dtype="uint16", sentences: int = 1) -> Path:
    """What Megatron-LM's IndexedDatasetBuilder writes: documents of one or more sequences."""
    codes = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
    sequences = [part for document in documents for part in np.array_split(np.array(document, dtype), sentences)]
    lengths = np.array([len(part) for part in sequences], "<i4")
    np.concatenate(sequences).tofile(f"{prefix}.bin")
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype="<i8") * np.dtype(dtype).itemsize]).astype("<i8")
    ends = np.arange(0, len(sequences) + 1, sentences, dtype="<i8")
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, codes[dtype], len(sequences), len(ends)))
        file.write(lengths.tobytes() + pointers.tobytes() + ends.tobytes())
    return prefix.with_name(f"{prefix.name}.bin")


def datatrove(path: Path, documents, itemsize=2, metadata: str | None = "gpt2", index=True) -> Path:
    tokens = np.concatenate([np.array(document, f"<u{itemsize}") for document in documents])
    tokens.tofile(path)
    if index:
        np.cumsum([len(document) for document in documents]).astype("<u8").tofile(f"{path}.index")
    if metadata:
        Path(f"{path}.metadata").write_text(f"{metadata}|{itemsize}\n{len(tokens)}\n{len(tokens)} T")
    return path


@pytest.fixture
def settings(tmp_path, folder_with_tokenizer):
    def made(path, **changes) -> DataConfig:
        given = {"tokenizer": str(folder_with_tokenizer), "cache_dir": str(tmp_path / "cache"), "val_fraction": 0.1}
        return DataConfig(source=Source.tokens, **{"path": path and str(path), **given, **changes})

    return made


def read(prepared, split: str) -> list[int]:
    stream = getattr(prepared, split)(1).stream
    return stream.read(0, stream.num_tokens).tolist()


def whole(prepared) -> list[list[int]]:
    """All documents, by the ends that are known of both splits."""
    found = []
    for split in ("train", "val"):
        ends = np.concatenate(list(prepared.ends(split)) or [np.empty(0, np.int64)])
        assert not len(ends) or ends[-1] == getattr(prepared, f"num_{split}_tokens")
        found += [part.tolist() for part in np.split(np.array(read(prepared, split), int), ends)[:-1]]
    return found


WRITERS = {
    "Megatron uint16": megatron,
    "Megatron int32, sentences": partial(megatron, dtype="int32", sentences=2),
    "datatrove": lambda prefix, documents: datatrove(prefix.with_suffix(".ds"), documents),
    "datatrove, four bytes": lambda prefix, documents: datatrove(prefix.with_suffix(".ds"), documents, 4),
    "datatrove without metadata": lambda prefix, documents: datatrove(prefix.with_suffix(".ds"), documents, 4, None),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("eos", [True, False])
def test_documents_are_read_where_they_lie(tmp_path, settings, folder_with_tokenizer, writer, eos):
    end = eos_id(load_tokenizer(folder_with_tokenizer)) if eos else None
    folder = tmp_path / "tokens"
    folder.mkdir()
    documents = [documents_of(100, end, seed) for seed in range(2)]
    for name, some in zip("ab", documents, strict=True):
        WRITERS[writer](folder / name, some)
    data = settings(folder)
    prepared = ready(data)
    assert sorted(whole(prepared)) == sorted(documents[0] + documents[1])
    total = prepared.num_train_tokens + prepared.num_val_tokens
    assert 0.05 < prepared.num_val_tokens / total < 0.2
    first = [token for some in documents for document in some for token in document]
    assert read(prepared, "train")[:300] == first[:300]
    # Of each file the end is held out, and only documents that are whole.
    held_out: list[int] = []
    for some in documents:
        cut = sum(map(len, some)) - round(0.1 * sum(map(len, some)))
        before = next(n for n in range(99, 0, -1) if sum(map(len, some[:n])) <= cut)
        held_out += chain.from_iterable(some[before:])
    assert read(prepared, "val") == held_out
    # Documents that no end token stands in front of are marked, others not.
    sequences = prepared.train(16)
    ends = np.concatenate(list(prepared.ends("train")))
    for index in range(len(sequences)):
        marks = np.flatnonzero(sequences.starts(index)) + index * 16
        begins = {0, *ends.tolist()} & set(range(index * 16, index * 16 + 17))
        assert set(marks.tolist()) == ({b for b in begins if b == 0} if eos else begins)
    assert len(list((tmp_path / "cache").rglob("*.bin"))) == 0 and ready(data) == prepared


def test_one_dataset_by_its_files_or_by_what_stands_before_their_endings(tmp_path, settings, capsys):
    documents = documents_of(50)
    megatron(tmp_path / "text_document", documents)
    datatrove(tmp_path / "a.ds", documents_of(9))
    (tmp_path / "README.md").write_text("no tokens")
    for path in ("text_document", "text_document.bin", "text_document.idx", "text*.*"):
        assert whole(ready(settings(tmp_path / path))) == documents
    assert len(whole(ready(settings(tmp_path / "a.ds")))) == 9
    capsys.readouterr()
    assert len(whole(ready(settings(tmp_path / "[Rat]*")))) == 59
    assert "2 files, 59 documents; 1 other files are not read (README.md)" in capsys.readouterr().err


def test_bare_ids(tmp_path, settings):
    tokens = np.random.default_rng(0).integers(0, 256, 1000)
    np.save(tmp_path / "a.npy", tokens.astype("int32"))
    tokens.astype("uint16").tofile(tmp_path / "b.bin")
    with open(tmp_path / "c.bin", "wb") as file:  # llm.c
        file.write(np.array([20240520, 1, 1000, *[0] * 253], "<i4").tobytes() + tokens.astype("uint16").tobytes())
    prepared = ready(settings(tmp_path / "*.*", token_dtype="uint16"))
    assert read(prepared, "train") == tokens[:900].tolist() * 3 and read(prepared, "val") == tokens[900:].tolist() * 3
    assert prepared.train(8).starts(0) is None
    with pytest.raises(BadInput, match=r"^data\.packing=best_fit: the token files do not say where documents end; "):
        list(prepared.ends("train"))
    (said,) = problems(settings(tmp_path / "b.bin"))
    assert said.startswith("data.token_dtype=null: ") and said.endswith("data.token_dtype=uint32 would work")


def legacy(path: Path) -> None:
    path.with_suffix(".idx").write_bytes(b"TNTIDX\x00\x00" + bytes(40))


def shorter(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def shorter_index(path: Path) -> None:
    index = path.with_suffix(".idx")
    os.truncate(index, index.stat().st_size - 8)


def changed(offset: int, value: bytes):
    def change(path: Path) -> None:
        with open(path.with_suffix(".idx"), "r+b") as file:
            file.seek(offset)
            file.write(value)

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (legacy, "cached and lazy datasets (TNTIDX), which is not read"),
        (shorter, "does not fit"),
        (shorter_index, "bytes and not the"),
        (changed(9, b"\2"), "version 2 of Megatron-LM's index is not read"),
        (changed(17, b"\6"), "type 6, which is not one of token ids, of Megatron-LM's"),
        (changed(0, b"X"), "no index of Megatron-LM's"),
        (changed(34, b"\0\0\0\0"), "does not fit"),
        (changed(34 + 12 * 40, b"\7"), "documents do not ascend"),
        (changed(34 + 4 * 40 + 16, b"\1"), "the file has them elsewhere"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, settings, damage, said):
    path = megatron(tmp_path / "a", documents_of(40))
    damage(path)
    (problem,) = problems(settings(path))
    assert problem.startswith(f"data.path={path}: {tmp_path / 'a.idx'}: ") and said in problem
    assert problem.endswith(" would work") and not list((tmp_path / "cache").glob("*/meta.json"))


def test_what_cannot_be_is_all_said(tmp_path, settings):
    folder = tmp_path / "c"
    folder.mkdir()
    datatrove(folder / "a.ds", documents_of(9), metadata=None, index=False)
    datatrove(folder / "b.ds", documents_of(9))
    shorter(folder / "b.ds")
    np.save(folder / "c.npy", np.zeros(3))
    np.save(folder / "d.npy", np.zeros((3, 3), int))
    (folder / "e.npy").write_bytes(b"x")
    (folder / "f.bin").write_bytes(b"x" * 9)
    (folder / "g.ds").write_bytes(b"x" * 8)
    (folder / "g.ds.metadata").write_text("gpt2")
    said = problems(settings(folder, token_dtype="uint16"))
    assert [next(n for n in "abcdefg" if f"/c/{n}." in each.partition(": ")[2]) for each in said] == [*"abcdefg"]
    assert "the bytes of a token are not known, as there is neither" in said[0]
    assert all(each.startswith(f"data.path={folder}: ") and each.endswith(" would work") for each in said)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"tokenizer": None}, "data.tokenizer=null"),
        ({"token_dtype": "float32"}, "data.token_dtype=float32"),
        ({"path": None}, "data.path=null"),
        ({"path": "/nowhere/x.bin"}, "data.path=/nowhere/x.bin"),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, changes, key):
    said = problems(settings(**{"path": megatron(tmp_path / "a", documents_of(40)), **changes}))
    assert [each.partition(": ")[0] for each in said] == [key]


def test_empty_and_short_sources(tmp_path, settings):
    np.save(tmp_path / "a.npy", np.zeros(0, "uint16"))
    (said,) = problems(settings(tmp_path / "a.npy"))
    assert said.startswith(f"data.path={tmp_path / 'a.npy'}: none of its 1 files has tokens in it")
    np.save(tmp_path / "b.npy", np.zeros(50, "uint16"))
    said = problems(settings(tmp_path / "b.npy"), seq_len=64)
    assert [each.partition(":")[0] for each in said] == ["train.seq_len=64", "data.val_fraction=0.1"]


def test_other_tokenizers_are_refused_where_they_are_known_and_said_where_not(
    tmp_path, settings, folder_with_tokenizer, capsys
):
    path = datatrove(tmp_path / "a.ds", documents_of(40), metadata="gpt2")
    assert ready(settings(path)).num_train_tokens
    assert "made by gpt2, as .ds.metadata says; data.tokenizer=" in capsys.readouterr().err
    other = tmp_path / "other.json"
    described = json.loads((folder_with_tokenizer / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    last = sorted(vocabulary, key=vocabulary.get)[:2]
    vocabulary[last[0]], vocabulary[last[1]] = vocabulary[last[1]], vocabulary[last[0]]
    other.write_text(json.dumps(described))
    datatrove(tmp_path / "b.ds", documents_of(40), metadata=str(other))
    (said,) = problems(settings(tmp_path / "b.ds"))
    assert "which has another vocabulary" in said and said.endswith(f"data.tokenizer={other} would work")
    assert ready(settings(tmp_path / "b.ds", tokenizer=str(other))).num_train_tokens
    (said,) = problems(settings(tmp_path / "*.ds"))
    assert f"made by 2 tokenizers, {other}, gpt2," in said


def test_an_id_beyond_the_vocabulary_is_named_when_it_is_read(tmp_path, settings):
    documents = documents_of(40)
    for name in "ab":
        megatron(tmp_path / name, documents, "int32")
    tokens = np.fromfile(tmp_path / "b.bin", "<i4")
    for place, wrong in ((5, 300), (40, -1)):
        tokens[place] = wrong
    tokens.tofile(tmp_path / "b.bin")
    sequences = ready(settings(tmp_path / "?.*", val_fraction=0.0)).train(8)
    before = len(tokens)
    for place, wrong in ((5, 300), (40, -1)):
        with pytest.raises(ChangedTokens, match=rf"b\.bin, token {place}: holds id {wrong} in sequence"):
            sequences[(before + place) // 8]
    assert sequences[0].tolist() == np.fromfile(tmp_path / "a.bin", "<i4")[:9].tolist()


# Other file systems


@pytest.fixture
def memory(tmp_path):
    """A folder in fsspec's memory, by its URL."""
    fs = fsspec.filesystem("memory")
    name = f"memory://{tmp_path.name}"
    yield name, lambda path: fs.put(str(path), f"{name}/{path.name}")
    if fs.exists(name):
        fs.rm(f"/{tmp_path.name}", recursive=True)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_text_of_another_file_system_is_prepared_as_that_of_a_folder(tmp_path, files_config, jsonl, memory, scheme):
    lines = jsonl.read_text().splitlines()
    (jsonl.parent / "more.txt").write_text("some more text\n" * 9)
    (jsonl.parent / ".hidden").write_text("not this")
    folder, put = memory if scheme == "memory" else (f"file://{jsonl.parent}", lambda _: None)
    for path in jsonl.parent.iterdir():
        put(path)
    here, there = ready(files_config(jsonl.parent)), ready(files_config(folder))
    assert there.fingerprint != here.fingerprint and there.tally == here.tally
    for split in ("train", "val"):
        assert read(there, split) == read(here, split)
    assert len(lines) + 1 == there.tally["documents"]
    assert ready(files_config(f"{folder}/*.jsonl")).tally["documents"] == len(lines)
    (said,) = problems(files_config(f"{folder}/none/*.txt"))
    assert said.endswith("no file is there; a file, a folder with files or a glob would work")


def test_tokens_of_another_file_system(tmp_path, settings, memory):
    documents = documents_of(60)
    path = megatron(tmp_path / "text_document", documents)
    folder, put = memory
    for file in (path, path.with_suffix(".idx")):
        put(file)
    here = ready(settings(path))
    for url in (f"{folder}/text_document", f"{folder}/text_document.bin", folder, f"file://{path}"):
        there = ready(settings(url))
        assert read(there, "train") == read(here, "train") and read(there, "val") == read(here, "val")
        assert whole(there) == documents


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/a", "s3fs"), ("gs://bucket/a", "gcsfs")])
def test_a_package_that_is_missing_is_named(url, package):
    pytest.importorskip("fsspec")
    with pytest.raises(BadInput) as caught:
        list_remote(url)
    (said,) = caught.value.problems
    assert said.startswith(f"data.path={url}: ") and package in said and said.endswith("would work")


def test_blocks_are_asked_for_once_a_machine_and_shared(tmp_path, capsys):
    content = np.random.default_rng(0).bytes(3 * BLOCK + 100)
    (tmp_path / "a").write_bytes(content)
    remote, asked = RemotePath(f"file://{tmp_path}/a", len(content), "x"), []

    def opens(path):
        file = path.open()
        real = file.read
        file.read = lambda size: asked.append(file.tell()) or real(size)
        return file

    made = [KeptBytes(remote, tmp_path / "kept", opens) for _ in range(2)]
    for number in range(200):
        start = int(np.random.default_rng(number).integers(0, len(content)))
        count = int(np.random.default_rng(number).integers(1, 2 * BLOCK))
        assert made[number % 2].pread(count, start) == content[start : start + count]
    assert sorted(asked) == [0, BLOCK, 2 * BLOCK, 3 * BLOCK]
    assert made[0].pread(9, len(content)) == b"" and made[0].size() == len(content)
    made[0].close()
    # Another content under the same name is another file.
    other = KeptBytes(RemotePath(remote.url, remote.size, "y"), tmp_path / "kept", opens)
    assert other.pread(5, 0) == content[:5] and asked.count(0) == 2
    # What a boot before this one had kept may not be whole.
    (boot,) = (tmp_path / "kept").glob("*/*")
    boot.rename(boot.with_name("a-boot-before"))
    again = KeptBytes(remote, tmp_path / "kept", opens)
    assert again.pread(5, 0) == content[:5] and asked.count(0) == 3 and not boot.with_name("a-boot-before").exists()
    assert not capsys.readouterr().err


def test_where_nothing_can_be_kept_everything_is_read(tmp_path, monkeypatch, capsys):
    content = np.random.default_rng(0).bytes(2 * BLOCK)
    (tmp_path / "a").write_bytes(content)
    remote = RemotePath(f"file://{tmp_path}/a", len(content), "x")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(blocks.os, "pwrite", full)
        opened = KeptBytes(remote, tmp_path / "kept")
        for _ in range(2):
            assert opened.pread(len(content), 0) == content
    assert capsys.readouterr().err.count("what is read is not kept on this machine ([Errno 28]") == 1
    (tmp_path / "a").write_bytes(content[:100])
    with pytest.raises(OSError, match="ends after 100 of"):
        KeptBytes(remote, tmp_path / "kept").pread(200, 0)


def test_a_run_over_remote_tokens_goes_on_in_a_message(tmp_path, settings, memory):
    path = megatron(tmp_path / "a", documents_of(60))
    folder, put = memory
    put(path)
    put(path.with_suffix(".idx"))
    sequences = prepare(settings(folder), 320, 8, progress=False).train(8)
    fsspec.filesystem("memory").rm(f"{folder}/a.bin")
    with pytest.raises(ChangedTokens, match=r"a\.bin: cannot be read any more \("):
        sequences[0]
