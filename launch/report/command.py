"""`deepnarrow report`: run folders in, a page of HTML out."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from launch.report.history import history_of
from launch.report.plots import ShownRun
from launch.run_folder import RunFolder, is_run
from launch.runs import distinct_names
from model.problems import BadInput

OUT = "report.html"


def run(options: argparse.Namespace) -> int:
    """Write the report of runs, and print where it is.

    Raises:
        BadInput: a path is no run folder, or the page cannot be written.
    """
    runs = read(options.runs)
    out: Path = options.out or (options.runs[0] / OUT if len(runs) == 1 else Path(OUT))
    from launch.report.page import page

    written = page(runs, options.x)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(out.name + ".tmp")
        unfinished.write_text(written, "utf-8")
        unfinished.rename(out)
    except OSError as error:
        raise BadInput(
            [f"--out={out}: {error.strerror}; a file in a folder that can be written to would work"]
        ) from None
    print(f"{out}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {len(written) / 1e6:.1f} MB; any browser opens it")
    return 0


def read(paths: Sequence[Path]) -> list[ShownRun]:
    """Read runs, each under a name that no other has.

    Raises:
        BadInput: some of the paths are no run folders, or stand there twice.
    """
    problems = [
        f"{path}: no run folder; one with metrics.jsonl, such as those that `deepnarrow runs` lists, would work"
        for path in paths
        if not is_run(path)
    ]
    problems += [
        f"{path}: stands there {count} times; once would work"
        for path, count in Counter(path.resolve() for path in paths).items()
        if count > 1
    ]
    if problems:
        raise BadInput(problems)
    names, folders = distinct_names(paths), [RunFolder(path) for path in paths]
    return [ShownRun(names[folder.path], folder, history_of(folder.chunks())) for folder in folders]
