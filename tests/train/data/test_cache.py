import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from conf.train_settings import DataConfig
from tests.train.data.helpers import VOCAB, ready, texts_of
from train.data import build, cache

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
    monkeypatch.setattr(build, "tokenise", None)
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
from train.data import build, cache
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


def test_processes_at_once_build_once(jsonl, files_config, tmp_path):
    """Each builder waits until both processes have begun, so without the lock both would build."""
    code = f"""
    folder, tokenise = Path({str(tmp_path)!r}), build.tokenise
    def counted(*args):
        (folder / f"built-{{os.getpid()}}").touch()
        while len(list(folder.glob("begun-*"))) < 2:
            time.sleep(0.01)
        time.sleep(0.3)
        return tokenise(*args)
    build.tokenise = counted
    (folder / f"begun-{{os.getpid()}}").touch()
    print(prepare(data, {VOCAB}, 8, progress=False).folder)
    """
    both = [run(code, files_config(jsonl)) for _ in range(2)]
    folders = {process.communicate(timeout=60)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(folders) == 1 and len(list(tmp_path.glob("built-*"))) == 1


@pytest.mark.parametrize(
    "moment",
    [
        "build.TokenWriter.write",
        "build.TokenWriter.close",
        "cache.sync",
        "cache.os.rename",
        "train.data.tokenizer.train_tokenizer",
    ],
)
def test_killed_at_any_moment(jsonl, files_config, moment):
    data = files_config(jsonl)
    code = f"""
    import train.data.tokenizer, train
    {moment} = lambda *args, **more: os.kill(os.getpid(), signal.SIGKILL)
    prepare(data, {VOCAB}, 8, progress=False)
    """
    process = run(code, data)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert ".tmp-" in folders(data)[-1].name
    prepared = ready(data)
    assert [path for path in folders(data) if path.parent.name != "tokenizers"] == [prepared.folder]
    assert len(folders(data)) == 2
    assert len(texts_of(prepared, "train") + texts_of(prepared, "val")) == 50


def test_an_error_leaves_nothing(jsonl, files_config, monkeypatch):
    data = files_config(jsonl)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "tokenise", fail)
    with pytest.raises(KeyboardInterrupt):
        ready(data)
    assert [path.parent.name for path in folders(data)] == ["tokenizers"]


def test_leftovers_of_other_corpora_go_unless_someone_builds_them(jsonl, files_config):
    from filelock import FileLock

    data = files_config(jsonl)
    dead, alive = (Path(data.cache_dir, name) for name in ("aa.tmp-1-2", "bb.tmp-1-2"))
    for folder in (dead, alive):
        folder.mkdir(parents=True)
    with FileLock(Path(data.cache_dir, "bb.lock")):
        ready(data)
    assert alive.exists() and not dead.exists()


@pytest.mark.parametrize("damage", ["train.bin", "tokenizer.json", "meta.json", "short", "meta"])
def test_a_damaged_cache_is_built_again(jsonl, files_config, damage):
    data = files_config(jsonl)
    prepared = ready(data)
    before = texts_of(prepared, "train")
    if damage == "short":
        os.truncate(prepared.folder / "val.bin", 10)
    elif damage == "meta":
        (prepared.folder / "meta.json").write_text("[]")
    else:
        (prepared.folder / damage).unlink()
    with pytest.warns(RuntimeWarning, match="is damaged .* prepared again"):
        assert ready(data) == prepared
    assert texts_of(prepared, "train") == before


def test_files_are_on_disk_before_the_rename(jsonl, files_config, monkeypatch):
    synced, renamed = [], []
    monkeypatch.setattr(cache, "sync", lambda path: synced.append(path.name))
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (renamed.append(list(synced)), rename(a, b)))
    prepared = ready(files_config(jsonl))
    assert {"train.bin", "val.bin", "tokenizer.json", "meta.json"} < set(renamed[-1]) and synced[-1] == "cache"
    assert prepared.folder.is_dir()
