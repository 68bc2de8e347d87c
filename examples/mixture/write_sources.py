"""Writes three small sources into a folder, each in another format, from what every Python brings.

python write_sources.py FOLDER
"""

import ast
import gzip
import json
import pydoc_data.topics
import sys
import sysconfig
from pathlib import Path

import pyarrow
import pyarrow.parquet

PACKAGES = ("asyncio", "email", "http", "json", "logging")


def main(folder: Path) -> None:
    """Write code.jsonl, docstrings.parquet and manual.jsonl.gz, a document a line or row, and say how many."""
    folder.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for package in PACKAGES for path in sorted((library / package).rglob("*.py"))]
    code = [text for text in (path.read_text("utf-8") for path in files) if text]
    docstrings = [said for text in code for said in docstrings_of(text)]
    manual = [*pydoc_data.topics.topics.values()]
    with open(folder / "code.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in code)
    pyarrow.parquet.write_table(pyarrow.table({"docstring": docstrings}), folder / "docstrings.parquet")
    with gzip.open(folder / "manual.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in manual)
    print(f"{folder}: {len(code)} files of code, {len(docstrings)} docstrings, {len(manual)} topics of the manual")


def docstrings_of(text: str) -> list[str]:
    """Return the docstrings of a module, of its classes and its functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return [said for said in found if said]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
