"""Small corpora, and settings that point at them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from conf.train_settings import DataConfig
from tests.train.data.helpers import local
from train.data.tokenizer import train_tokenizer


@pytest.fixture
def files_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """Settings for a local corpus, cached in a folder of the test."""
    return partial(local, tmp_path)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    """Fifty different short documents, a line each."""
    path = tmp_path / "corpus" / "docs.jsonl"
    path.parent.mkdir()
    lines = [json.dumps({"text": f"document number {i}\nsays that {i} squared is {i * i}.\n"}) for i in range(50)]
    path.write_text("\n".join(lines), "utf-8")
    return path


@pytest.fixture
def folder_with_tokenizer(tmp_path: Path) -> Path:
    """A folder with the tokenizer.json of a small tokenizer trained elsewhere."""
    folder = tmp_path / "tok"
    folder.mkdir()
    train_tokenizer(iter(["document number squared says that is"] * 9), 300).save(str(folder / "tokenizer.json"))
    return folder
