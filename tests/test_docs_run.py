"""The commands of the documentation, run as a reader would, on small settings: what they print is what pages show.

Each page has a folder of its own, in which its blocks run in order. In the place of DeepSpeed's launcher ranks are
forked from the tests' process (`tests.ranks`); all else is what `deepnarrow` does.
"""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import zstandard

from launch import cli
from launch.rerun import run as rerun
from tests.docs_blocks import PAGES, PROSE, Block, as_compared, blocks_of, missing_lines, taken_apart, with_settings
from tests.ranks import ROOT, nursery
from tests.small import small_run, write_corpus
from tests.train.data.test_formats import documents_of, megatron

BLOCKS = {page: blocks_of(page) for page in PAGES}
OUTSIDE = ("corpus", "raw", "refined", "pile", "tasks", "megatron")
"""Folders at the root of a reader's machine, which stand in the page's folder here."""
SMALL = [text for text in small_run(Path(), Path()) if text.startswith(("model.", "train.", "data.val_fraction="))]
TRAINED = [*SMALL, "train.max_steps=12", "checkpoint.every_steps=4", "checkpoint.keep_last=9", "train.timeline_at=[5]"]


class InThisFolder:
    """Forks as `launch.trainings.forks.Forks` does, from the tests' process, in the working directory of now."""

    def __init__(self, *settings):
        pass

    def start(self, module, num, arguments, logs, environment=None, append=False):
        arguments = [str(Path.cwd()), module, *arguments]
        return nursery().forks.start("tests.in_folder", num, arguments, logs.absolute(), environment, append)

    def close(self):
        pass


def launched(arguments, num_processes, run_dir, persistence=None):
    """Train as `launch.supervise.launch` does."""
    logs = Path("logs").absolute()
    logs.mkdir(exist_ok=True)
    arguments = [str(Path.cwd()), "train.pretrain", *arguments]
    codes = nursery().start("tests.in_folder", num_processes, arguments, logs).wait(120)
    print((logs / "rank0.log").read_text())
    return max(map(abs, codes))


def computed_again(folder, size, environment):
    """Start the ranks of `deepnarrow rerun`."""
    ranks = nursery().start("launch.rerun.rank", size, [str(folder)], folder, **environment)
    return ranks.wait(120)


@pytest.fixture(scope="module")
def at_hand(corpus, tmp_path_factory):
    """What readers have: texts, tasks, token files, a run, and a directory of Hugging Face's."""
    folder = tmp_path_factory.mktemp("at hand")
    whole = "".join(path.read_text("utf-8") for path in sorted(corpus.glob("*.py"))[:16])
    texts = [{"text": whole[start : start + 2000]} for start in range(0, len(whole), 2000)]
    for at, name in enumerate(("corpus/a", "corpus/b", "raw/a", "pile/val")):
        path = folder / f"{name}.jsonl.zst"
        path.parent.mkdir(exist_ok=True)
        lines = "".join(json.dumps(text) + "\n" for text in texts[at::4])
        path.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    (folder / "library").mkdir()
    write_corpus(folder / "library", files=100)
    (folder / "tasks").mkdir()
    asked = {"context": "import ", "choices": ["os", "bread"], "answer": 0}
    (folder / "tasks" / "arc.jsonl").write_text(f"{json.dumps(asked)}\n" * 12)
    (folder / "megatron").mkdir()
    megatron(folder / "megatron" / "text_document", documents_of(400))
    return folder


@pytest.fixture(scope="module")
def trained(at_hand, tmp_path_factory):
    """A run of two stages that has ended, and its export, a directory of Hugging Face's."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        as_here(patch, folder, at_hand)
        given = ["data=files", f"data.path={at_hand}/corpus", "data.val_fraction=0.2", "parallel.pp=2"]
        assert cli.main(["train", *TRAINED, *given, "hydra.run.dir=run"]) == 0
        assert cli.main(["export", "run", "hf"]) == 0
    return folder


def as_here(patch, folder, at_hand):
    """Work in a folder, with prepared corpora that all pages share, W&B off, and ranks that are forked."""
    patch.chdir(folder)
    patch.setenv("DEEPNARROW_CACHE", str(at_hand / "cache"))
    patch.setenv("WANDB_MODE", "disabled")
    patch.setattr("launch.supervise.launch", launched)
    patch.setattr("launch.trainings.starts.Forks", InThisFolder)
    patch.setattr(rerun, "started", computed_again)


@pytest.fixture
def reader(at_hand, trained, tmp_path, monkeypatch, capfd):
    """What runs blocks in a folder of a page's own."""
    as_here(monkeypatch, tmp_path, at_hand)
    return Reader(at_hand, trained, tmp_path, monkeypatch, capfd)


class Reader:
    """Runs the blocks of a page in a folder, in which lies what they name and no command of the page makes."""

    def __init__(self, at_hand, trained, folder, patch, captured):
        self.at_hand, self.trained, self.folder = at_hand, trained, folder
        self.patch, self.captured = patch, captured

    def lay_out(self, blocks):
        told = [(block.text, *(mark.said for mark in block.marks)) for block in blocks if block.said("run")]
        named = "\n".join(text for texts in told for text in texts)
        for name in OUTSIDE:
            if f"/{name}" in named and (self.at_hand / name).exists():
                shutil.copytree(self.at_hand / name, self.folder / name)
        for name in set(re.findall(r"runs/[\w-]+", named)):
            shutil.copytree(self.trained / "run", self.folder / name, symlinks=True)
        shutil.copytree(self.trained / "hf", self.folder / "deepseek-llm-7b-base")
        shutil.copy(self.trained / "hf" / "tokenizer.json", self.folder)

    def run(self, block: Block):
        if (named := block.said("file")) is not None:
            path = self.folder / named[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif block.kind == "python" and block.said("run") is not None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sysconfig.get_path", lambda *name: str(self.at_hand / "library"))
                exec(compile(block.text, block.where, "exec"), {"__name__": "__main__"})
        elif block.kind == "console":
            for command in block.commands():
                if block.said("run", command.text) is not None and block.said("not run", command.text) is None:
                    self.run_command(block, command)

    def run_command(self, block, command):
        words, rest = as_started(command.text)
        self.captured.readouterr()
        if words[0] == "deepnarrow":
            code = cli.main(self.as_here(words[1:], block.said("run", command.text)))
        else:
            code = subprocess.run(words).returncode
        printed = self.captured.readouterr()
        (expected,) = block.said("ends with", command.text) or ["0"]
        where = f"{block.where}: $ {command.text}\n{printed.out[-3000:]}\n{printed.err[-3000:]}"
        assert code == int(expected), f"exit code {code}: {where}"
        out = printed.out
        if rest:
            out = subprocess.run(f"cat {rest}", shell=True, input=out, stdout=-1, text=True, check=True).stdout
        if block.said("not compared", command.text) is None:
            said = f"{out}\n{printed.err}".replace(str(self.at_hand / "cache"), "~/.cache/deepnarrow")
            missing = missing_lines(command.shown, said)
            assert not missing, f"{block.where}: not printed:\n" + "\n".join(missing) + f"\n{where}"

    def as_here(self, words, settings):
        """The words of a command with its marks' settings, and the folder here in the place of folders outside."""
        asked = shlex.split(" ".join(settings))
        words = with_settings(words, [one for word in asked for one in (SMALL if word == "small" else [word])])
        outside = re.compile(rf"(?<![\w./~])/({'|'.join(OUTSIDE)})\b")
        return [outside.sub(rf"{self.folder}/\1", word) for word in words]


def as_started(command):
    """The words of a command, the quickstart's as those of what it starts, and the rest of its line from a pipe on."""
    words, rest = taken_apart(command)
    if words[0] == "./launch/quickstart":
        (line,) = re.findall(r"^exec (deepnarrow .*) \"\$@\"$", (ROOT / "launch" / "quickstart").read_text(), re.M)
        words[:1] = shlex.split(line)
    return words, rest


def pages_that(what):
    return [page for page, blocks in BLOCKS.items() if any(block.said(what) for block in blocks)]


@pytest.mark.launch
@pytest.mark.parametrize("page", pages_that("run"), ids=lambda page: page.name)
def test_what_a_page_has_typed_runs_and_prints_what_it_shows(page, reader):
    reader.lay_out(BLOCKS[page])
    for block in BLOCKS[page]:
        reader.run(block)


def test_every_block_is_run_or_says_why_not():
    run = left_out = 0
    for block in (block for blocks in BLOCKS.values() for block in blocks if block.kind not in PROSE):
        if block.kind == "yaml":
            assert block.said("file"), f"{block.where}: a file that commands find, or `text`"
            continue
        assert block.kind in ("console", "python"), f"{block.where}: nobody runs {block.kind}"
        commands = [command.text for command in block.commands()] if block.kind == "console" else ["python"]
        for command in commands:
            reasons = block.said("not run", command)
            assert reasons or block.said("run", command) is not None, (
                f"{block.where}: no mark says whether to run {command}"
            )
            assert all(len(reason) > 8 for reason in reasons or []), (
                f"{block.where}: no reason why {command} is not run"
            )
            run, left_out = run + (not reasons), left_out + bool(reasons)
        for mark in block.marks:
            assert any(mark.is_of(command) for command in commands), f"{block.where}: {mark} is of no command"
    assert run > left_out, f"{run} commands are run, {left_out} are not"


SHOWN = ("a  1,024 tokens in 3.5 s", "b", "...", "last 7")


@pytest.mark.parametrize(
    ("printed", "missing"),
    [
        ("before\na 2 tokens in 4 s\n\nb\nbetween\nlast 8e-3\nbehind", []),
        ("a 2 tokens in 4 s\nbetween\nb\nlast 8", ["a  1,024 tokens in 3.5 s", "b"]),
        ("a 2 tokens in 4 s\nc\na 2 tokens in 4 s\nb\nlast 8", []),
        ("last 8\na 2 tokens in 4 s\nb", ["last 7"]),
        ("a 2 words in 4 s\nb\nlast 8", ["a  1,024 tokens in 3.5 s", "b"]),
    ],
)
def test_lines_are_found_in_their_order_whatever_their_figures(printed, missing):
    assert missing_lines(SHOWN, printed) == missing


def test_figures_and_fingerprints_alone_may_differ():
    assert as_compared("in ~/.cache/222f3fe435 3.5e-4 98%  (307k)") == as_compared(
        "in ~/.cache/a120b7e9c1 12 1,000% (5M)"
    )
    assert as_compared("added 7") != as_compared("decade 7")


def test_marks_are_read_and_settings_take_their_places(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text\n\n<!-- run: a=3 --c=x -->\n<!-- not run b, d e: too\n long -->\n```console\n"
        "$ deepnarrow z a=1 \\\n    --c y w # why\nshown\n$ b\n$ deepnarrow d e | f\n$ deepnarrow d g > h\n```\n"
    )
    (block,) = blocks_of(page)
    assert (block.line, block.kind, [mark.verb for mark in block.marks]) == (6, "console", ["run", "not run"])
    texts = [command.text for command in block.commands()]
    assert [block.said("not run", text) for text in texts] == [None, ["too long"], ["too long"], None]
    assert [len(command.shown) for command in block.commands()] == [1, 0, 0, 0]
    words, rest = taken_apart(texts[0])
    assert with_settings(words, [*block.said("run", texts[0])[0].split(), "k=v"]) == [
        *["deepnarrow", "z", "a=3", "--c=x", "w", "k=v"]
    ]
    assert (rest, taken_apart(texts[3])) == ("", (["deepnarrow", "d", "g"], "> h"))
