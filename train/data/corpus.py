"""Where documents come from: the interpreter's own library, local files, or a hub dataset."""

import difflib
import glob
import os
import platform
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from conf.paths import expanded, path_problems
from conf.train_settings import CorpusConfig, DataConfig, Source
from model.problems import BadInput
from train.data.columns import CorpusPath, check_columns, saved_dataset, saved_splits
from train.data.formats.remote import RemotePath, is_url, list_remote
from train.data.formats.token_files import DTYPES, companions_of
from train.data.readers import read_file, usable
from train.data.tally import Tally
from train.data.tokenizer import MIN_VOCAB, too_small

__all__ = ["Tally", "check", "documents", "fingerprint_inputs", "list_files"]

_MAX_NAMED = 3
_INSTALLED = frozenset({"site-packages", "dist-packages", "__pycache__"})
_TABLES = frozenset({"encodings", "pydoc_data"})
"""Folders of the standard library whose files programs have made of tables: codecs, and the help of `pydoc`. They are a
fifteenth of its text, and teach a small model box-drawing characters."""


def check(data: DataConfig) -> list[str]:
    """Find problems that show without reading the corpus.

    Returns:
        One sentence each, `key=value: what is wrong; what would work`; empty when nothing is wrong.
    """
    problems = path_problems("data.cache_dir", data.cache_dir) + _check_source(data)
    if data.tokenizer is not None:
        problems += _check_tokenizer(data.tokenizer)
    if not 0 <= data.val_fraction < 1:
        problems.append(
            f"data.val_fraction={data.val_fraction}: not a share of the documents; a number from 0 up to, but not "
            "including, 1 would work, such as 0.01"
        )
    if data.tokenizer is None and data.tokenizer_sample_mb < 1:
        problems.append(
            f"data.tokenizer_sample_mb={data.tokenizer_sample_mb}: a tokenizer cannot be trained on no text; "
            "1 or more would work, such as 256"
        )
    size = data.tokenizer_vocab_size
    if data.tokenizer is None and size is not None and size < MIN_VOCAB:
        problems.append(too_small("data.tokenizer_vocab_size", size))
    if not 0 <= data.max_bad <= 1:
        problems.append(f"data.max_bad={data.max_bad}: not a share of the records; a number from 0 to 1 would work, "
                        "such as 0.05")  # fmt: skip
    if data.document_separator == "":
        problems.append(
            "data.document_separator='': nothing to cut at; null (each file one document) or a string that stands "
            "between documents would work"
        )
    return problems


def _check_source(data: DataConfig) -> list[str]:
    problems = []
    # A path or name that is not read would mean hours of training on the wrong text.
    if data.path is not None and data.source not in (Source.files, Source.tokens):
        problems.append(
            f"data.path={data.path}: data.source={data.source.value} does not read it; data.source=files would"
        )
    if data.name is not None and data.source is not Source.hub:
        problems.append(f"data.name={data.name}: data.source={data.source.value} does not read it; "
                        "data.source=hub would")  # fmt: skip
    if data.source is Source.hub and not data.name:
        problems.append("data.name=null: data.source=hub needs one; a dataset's hub name such as "
                        "HuggingFaceFW/fineweb-edu would work")  # fmt: skip
    if data.source is Source.hub and data.name and not path_problems("data.name", data.name):
        problems += _check_saved(expanded(data.name), f"data.name={data.name}")
    if data.source in (Source.files, Source.tokens):
        problems += _check_path(data)
    if data.source is Source.tokens and data.tokenizer is None:
        problems.append("data.tokenizer=null: token files do not hold the tokenizer that made them; its "
                        "tokenizer.json, or a folder with it, would work")  # fmt: skip
    if data.token_dtype is not None and data.token_dtype not in DTYPES:
        problems.append(f"data.token_dtype={data.token_dtype}: no type of token ids; {' or '.join(DTYPES)} would work")
    return problems


def _check_saved(path: Path, said: str) -> list[str]:
    """Whether a folder is what `save_to_disk` has written, which the hub's loader does not read."""
    splits = saved_splits(path)
    saved = path / splits[0] if splits else path
    if saved_dataset(saved) is None:
        return []
    return [f"{said}: a folder that datasets' save_to_disk has written, and no dataset of the hub; data=files "
            f"data.path={saved} would work"]  # fmt: skip


def _check_path(data: DataConfig) -> list[str]:
    if not data.path:
        return [f"data.path=null: data.source={data.source.value} needs one; a file, a folder or a glob would work"]
    said = f"data.path={data.path}"
    if is_url(data.path):
        return _check_remote(data, said)
    if problems := path_problems("data.path", data.path):
        return problems
    path = expanded(data.path)
    if not path.exists() and not glob.has_magic(data.path) and not _companions(data, path):
        return [f"{said}: no such file or folder; {_near(path)}"]
    if len(splits := saved_splits(path)) > 1:
        works = " or ".join(f"data.path={path / split}" for split in splits[:_MAX_NAMED])
        return [f"{said}: a dataset of {len(splits)} splits, written by save_to_disk; {works} would work"]
    files = _local_files(data)
    if not files:
        what = "the folder holds no file" if path.is_dir() else "the pattern matches no file"
        return [f"{said}: {what}; a file, a folder with files or a glob such as {_example_glob(path)} would work"]
    unreadable = [str(file) for _, file in files if not os.access(file, os.R_OK)]
    if unreadable:
        return [f"{said}: no permission to read {_few(unreadable)}; chmod +r, or a path without them, would work"]
    if all(file.stat().st_size == 0 for _, file in files):
        return [f"{said}: all {len(files)} files are empty; files with text in them would work"]
    return []


def _check_remote(data: DataConfig, said: str) -> list[str]:
    try:
        files = list_files(data)
    except BadInput as error:
        return error.problems
    if not files:
        return [f"{said}: no file is there; a file, a folder with files or a glob would work"]
    if not any(path.stat().st_size for _, path in files):
        return [f"{said}: all {len(files)} files are empty; files with text in them would work"]
    return []


def _check_tokenizer(given: str) -> list[str]:
    if problems := path_problems("data.tokenizer", given):
        return [f"{problem}, or null to train one on the corpus" for problem in problems]
    path = expanded(given)
    if not path.exists():
        return [f"data.tokenizer={given}: no such file or folder; {_near(path)}, or null to train one on the corpus"]
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        return [f"data.tokenizer={given}: the folder has no tokenizer.json; a folder with one, the file itself, or "
                "null to train one on the corpus would work"]  # fmt: skip
    return []


def _near(path: Path) -> str:
    """What stands in the folder under a similar name, or how far the path exists."""
    parent = path.parent
    if not parent.is_dir():
        while not parent.exists():
            parent = parent.parent
        return f"{parent} exists, the rest does not; a path that exists would work"
    close = difflib.get_close_matches(path.name, sorted(os.listdir(parent)), _MAX_NAMED, 0.5)
    if close:
        return " or ".join(str(parent / name) for name in close) + " would work"
    return "a path that exists would work"


def _example_glob(path: Path) -> str:
    folder = path if path.is_dir() else Path(*_plain_parts(path))
    return f"{folder / '**' / '*.jsonl'}"


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _plain_parts(path: Path) -> list[str]:
    """The parts of a glob before the first that has a wildcard."""
    parts: list[str] = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts


def list_files(data: DataConfig) -> list[tuple[str, CorpusPath]]:
    """List the corpus's files, as (name relative to the folder or glob, path), sorted by name; none for the hub.

    Of a folder or a `**` glob, hidden files are left out, and so is `data.cache_dir` where it lies inside the folder.

    Raises:
        BadInput: `data.path` is of another file system, which cannot be used.
    """
    if data.source in (Source.files, Source.tokens) and data.path and is_url(data.path):
        return list(list_remote(data.path, companions_of if data.source is Source.tokens else lambda _: ()))
    return list(_local_files(data))


def _local_files(data: DataConfig) -> list[tuple[str, Path]]:
    if data.source is Source.stdlib:
        root = Path(sysconfig.get_path("stdlib"))
        found = list(_walk(root, _INSTALLED | _TABLES))
        return sorted((p.relative_to(root).as_posix(), p) for p in found if p.suffix == ".py")
    if data.source not in (Source.files, Source.tokens) or not data.path:
        return []
    path = expanded(data.path)
    if path.is_file() or _companions(data, path):
        return sorted((each.name, each) for each in (path, *_companions(data, path)) if each.is_file())
    if path.is_dir():
        root, found = path, list(_walk(path))
    else:
        root = Path(*_plain_parts(path))
        found = [Path(p) for p in glob.iglob(str(path), recursive=True) if os.path.isfile(p)]
        found += {other for each in found for other in _companions(data, each)} - set(found)
    cache = expanded(data.cache_dir).resolve()
    if cache.is_relative_to(root.resolve()) and cache != root.resolve():
        found = [p for p in found if not p.resolve().is_relative_to(cache)]
    return sorted((p.relative_to(root).as_posix(), p) for p in found)


def _companions(data: DataConfig, path: Path) -> list[Path]:
    """The files that belong to one token file; both of Megatron's where what stands before their endings is given."""
    if data.source is not Source.tokens or path.is_dir():
        return []
    return [Path(other) for other in companions_of(str(path)) if os.path.isfile(other)]


def _walk(root: Path, without: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Files below `root` but hidden ones and those in folders named in `without`; follows links, once each."""
    seen = set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above it, or to one that was read
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(b for b in below if b not in without and not b.startswith("."))
        if (saved := saved_dataset(Path(folder))) is not None:  # what else is there describes these, or is a cache
            yield from (file for file in saved if file.is_file())
            continue
        if saved_splits(Path(folder)):
            continue
        for name in names:
            if not name.startswith(".") and os.path.isfile(os.path.join(folder, name)):
                yield Path(folder, name)


def fingerprint_inputs(data: DataConfig) -> dict[str, Any]:
    """Describe what decides the corpus's documents, JSON-able, without reading them.

    Files are known by relative name, size and modification time (ns), so a copy that keeps times counts as the same,
    and those of other file systems by what these tell of changes, such as an ETag;
    the standard library by version, names and sizes; a hub dataset by name, subset, split and revision: without a
    revision, what was fetched first stays.
    """
    if data.source is Source.hub:
        keys = ("name", "subset", "split", "revision", "text_field")
        return {"source": "hub", **{key: getattr(data, key) for key in keys}}
    listed = list_files(data)
    files = [(name, path.stat()) for name, path in listed]
    if data.source is Source.stdlib:
        version = f"{platform.python_implementation()} {platform.python_version()}"
        return {"source": "stdlib", "python": version, "files": [[name, s.st_size] for name, s in files]}
    return {
        "source": data.source.value,
        **(
            {"token_dtype": data.token_dtype}
            if data.source is Source.tokens
            else {"text_field": data.text_field, "document_separator": data.document_separator}
        ),
        "files": [
            [name, s.st_size, path.stamp if isinstance(path, RemotePath) else s.st_mtime_ns]
            for (name, s), (_, path) in zip(files, listed, strict=True)
        ],
    }


def documents(data: DataConfig, tally: Tally) -> Iterator[str]:
    """Stream the texts of all usable documents, in the same order every time.

    Args:
        data: the corpus.
        tally: counts what is read and skipped; `tally.documents` is how many were handed on.

    Raises:
        BadInput: the hub dataset cannot be opened, or tables have no such column of text as `data.text_field`.
    """
    if data.source is Source.hub:
        yield from hub_documents(data, tally)
        return
    if problems := check_tables(data):
        raise BadInput(problems)
    for name, path in list_files(data):
        yield from read_file(path, name, data.text_field, separator_of(data), tally)


def check_tables(data: DataConfig) -> list[str]:
    """Find tables that lack the column of text, by their schemas alone."""
    return [] if data.source in (Source.hub, Source.tokens) else check_columns(list_files(data), data.text_field)


def separator_of(data: DataConfig) -> str | None:
    """Return the string that plain text is cut at, None where each file is one document.

    A command line carries a newline as two characters, and Hydra leaves them so.
    """
    separator = data.document_separator if data.source is Source.files else None
    return separator and separator.replace("\\n", "\n").replace("\\t", "\t")


def hub_documents(data: DataConfig, tally: Tally) -> Iterator[str]:
    """Stream the texts of a dataset of the hub.

    Raises:
        BadInput: it cannot be opened, or has no such column as `data.text_field`.
    """
    from datasets import load_dataset

    try:
        stream = load_dataset(data.name, data.subset, split=data.split, revision=data.revision, streaming=True)
        rows = iter(stream)
        first = next(rows, None)
    except Exception as error:  # the library raises a dozen kinds for a wrong name, subset, split, or no network
        raise BadInput(
            [f"data.name={data.name}: cannot be opened ({type(error).__name__}: {error}); the name, data.subset="
             f"{data.subset or 'null'}, data.split={data.split} and data.revision={data.revision or 'null'} of an "
             "existing dataset, and network to reach it, would work"]
        ) from error  # fmt: skip
    if first is not None and data.text_field not in first:
        raise BadInput(
            [f"data.text_field={data.text_field}: {data.name} has no such column; one of its columns would work: "
             f"{', '.join(first)}"]
        )  # fmt: skip
    # Opened a second time, with the text alone: other columns may be images.
    for number, row in enumerate(stream.select_columns([data.text_field])):
        if usable(row[data.text_field], f"{data.name}:{number}", tally):
            yield row[data.text_field]


def no_documents(data: DataConfig, tally: Tally) -> str:
    """Say that nothing of a corpus can be used, and what would."""
    key = "name" if data.source is Source.hub else "path" if data.source is Source.files else "source"
    value = data.source.value if key == "source" else getattr(data, key)
    hint = ", a JSON object on each line," if tally.bad_json else ""
    hint += f", with the text in data.text_field={data.text_field}," if tally.no_text else ""
    hint = hint.replace(",,", ",")
    return f"data.{key}={value}: no usable document ({tally.summary()}); UTF-8 text{hint} would work"


def of_source(sources: Mapping[str, DataConfig], name: str, problems: Sequence[str], own: bool = True) -> list[str]:
    """Say which source of a mixture problems are of: by its own keys, or after a key that all share if it is `own`."""
    if list(sources) == [sources[name].source.value]:
        return list(problems)
    said = []
    for problem in problems:
        for key in (*(each.name for each in fields(CorpusConfig)), "source"):
            problem = re.sub(rf"\bdata\.{key}=", f"data.sources.{name}.{key}=", problem)
        if own and not problem.startswith(("data.tokenizer", f"data.sources.{name}.")):
            problem = re.sub("^([^:]*: )", rf"\1source {name}: ", problem, count=1)
        said.append(problem)
    return said
