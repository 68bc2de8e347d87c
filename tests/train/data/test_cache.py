import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from conf.train_settings import DataConfig
from tests.train.data.helpers import VOCAB, ready, texts_of
from train.data import cache, tokenise

ROOT = Path(__file__).parents[3]


def test_what_changes_the_fingerprint(jsonl, files_config, folder_with_tokenizer):
    def folder(vocab_size=VOCAB, seq_len=8, **changes):
        return ready(files_config(jsonl, **changes), vocab_size, seq_len).folder

    first = folder()
    assert folder(seq_len=4) == folder(tokenizer_vocab_size=VOCAB) == folder(split="x", subset="y") == first
    assert folder(vocab_size=400, tokenizer_vocab_size=VOCAB) == first
    changed = [
        folder(vocab_size=400),
        folder(val_fraction=0.3),
        folder(document_separator="<>"),
        folder(tokenizer_sample_mb=2),
        folder(tokenizer=str(folder_with_tokenizer)),
    ]
    jsonl.write_text(jsonl.read_text().replace("text", "body"))
    changed.append(folder(text_field="body"))
    assert len({first, *changed}) == 7
    os.utime(jsonl, ns=(0, 0))
    assert folder(text_field="body") not in changed


def test_a_corpus_in_the_cache_is_not_built_again(jsonl, files_config, monkeypatch):
    first = ready(files_config(jsonl))
    monkeypatch.setattr(tokenise, "tokenise_unit", None)
    assert ready(files_config(jsonl), seq_len=16) == first


def folders(data: DataConfig) -> list[Path]:
    """What is under the cache folder, tokenizers first."""
    cache_dir = Path(data.cache_dir)
    return [path for path in (*cache_dir.glob("tokenizers/*"), *cache_dir.iterdir())
            if path.is_dir() and path.name != "tokenizers"]  # fmt: skip


def run(code: str, data: DataConfig) -> subprocess.Popen:
    """A process that has `data`, `prepare`, `build` and `cache`, and runs `code`."""
    settings = {"path": data.path, "cache_dir": data.cache_dir, "val_fraction": 0.2, "tokenizer_sample_mb": 1}
    program = f"""
import os, signal, sys, time
from pathlib import Path
from conf.train_settings import DataConfig, Source
from train.data.prepare import prepare
from train.data import cache, shards, tokenise, tokenizer
data = DataConfig(source=Source.files, **{settings!r})
{textwrap.dedent(code)}
"""
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE)


def test_the_cached_path_imports_nothing_heavy(jsonl, files_config):
    ready(files_config(jsonl))
    code = f"""
    prepare(data, {VOCAB}, 8)
    print(sorted({{"datasets", "tokenizers", "torch", "pyarrow"}} & set(sys.modules)))
    """
    process = run(code, files_config(jsonl))
    assert process.communicate()[0].strip() == "[]" and process.returncode == 0


@pytest.mark.parametrize(
    "moment",
    ["tokenise.tokenise_unit", "shards.write_json", "cache.sync", "tokenise.os.rename", "tokenizer.train_tokenizer"],
)
def test_killed_at_any_moment(jsonl, files_config, moment):
    data = files_config(jsonl)
    code = f"""
    {moment} = lambda *args, **more: os.kill(os.getpid(), signal.SIGKILL)
    prepare(data, {VOCAB}, 8, progress=False)
    """
    process = run(code, data)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not list(Path(data.cache_dir).glob("*/meta.json"))
    prepared = ready(data)
    assert [path for path in folders(data) if path.parent.name != "tokenizers"] == [prepared.folder]
    assert len(folders(data)) == 2
    assert {path.name for path in prepared.folder.iterdir()} == {
        "index.npy", "meta.json", "recipe.json", "shards", "tokenizer.json"
    }  # fmt: skip
    assert len(texts_of(prepared, "train") + texts_of(prepared, "val")) == 50


def test_an_error_leaves_what_was_done_to_be_gone_on_from(jsonl, files_config, monkeypatch):
    data = files_config(jsonl)
    monkeypatch.setattr(tokenise, "_finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ready(data)
    monkeypatch.undo()
    monkeypatch.setattr(tokenise, "tokenise_unit", None)
    assert len(texts_of(ready(data), "train")) > 30


def test_leftovers_of_other_tokenizers_go_unless_someone_builds_them(jsonl, files_config):
    from filelock import FileLock

    data = files_config(jsonl)
    dead, alive = (Path(data.cache_dir, "tokenizers", name) for name in ("aa.tmp-1-2", "bb.tmp-1-2"))
    for folder in (dead, alive):
        folder.mkdir(parents=True)
    with FileLock(Path(data.cache_dir, "tokenizers", "bb.lock")):
        ready(data)
    assert alive.exists() and not dead.exists()


def test_a_tokenizer_without_locks_is_built_by_both(tmp_path, monkeypatch):
    import filelock

    def no_locks(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)

    def build(folder: Path) -> dict:
        if not (tmp_path / "made").exists():  # another finishes the same meanwhile
            cache.cached(tmp_path / "made", lambda folder: {"made": (folder / "a").write_text("x")})
        (folder / "a").write_text("x")
        return {"made": 1}

    assert cache.cached(tmp_path / "made", build)["made"] == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["made"]


@pytest.mark.parametrize(
    "damage", ["shards/000000.train.bin", "tokenizer.json", "meta.json", "short", "meta", "recipe.json", "index.npy"]
)
def test_a_damaged_cache_is_built_again(jsonl, files_config, damage):
    data = files_config(jsonl)
    prepared = ready(data)
    before = texts_of(prepared, "train")
    if damage == "short":
        os.truncate(prepared.folder / "shards" / "000000.val.bin", 10)
    elif damage == "meta":
        (prepared.folder / "meta.json").write_text("[]")
    else:
        (prepared.folder / damage).unlink()
    if damage == "recipe.json":  # says only what the folder is, and is not read when it is finished
        assert ready(data) == prepared
    else:
        with pytest.warns(RuntimeWarning, match="is damaged .* prepared again"):
            assert ready(data) == prepared
    assert texts_of(prepared, "train") == before


def test_files_are_on_disk_before_the_rename(jsonl, files_config, monkeypatch):
    synced, renamed = [], []
    monkeypatch.setattr(cache, "sync", lambda path: synced.append(path.name.rpartition(".")[0] or path.name))
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (renamed.append(list(synced)), rename(a, b)))
    prepared = ready(files_config(jsonl))
    before = {Path(path).name for path in renamed[-1]}
    shards = {f"000000.{split}.{kind}" for split in ("train", "val") for kind in ("bin", "ends")}
    assert {name.rpartition(".")[0] for name in before} >= shards
    assert {"000000.json", "meta.json", "recipe.json", "shards"} < before and synced[-1] == "cache"
    assert prepared.folder.is_dir()
