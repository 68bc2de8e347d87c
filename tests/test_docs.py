"""The documentation against the code: links, overrides, commands, file names, and what is quoted of error messages."""

import re
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest

from conf.schema import Config
from launch import docs_reference
from launch.cli import make_parser
from launch.depth.settings import DepthSettings
from launch.refine.settings import RefineSettings
from launch.scaling.settings import ScalingSettings
from launch.settings import settings_of
from launch.study.settings import StudySettings
from tests.docs_blocks import PAGES, ROOT, blocks_of, prose, taken_apart

FLOORS = ("conf", "deepnarrow", "examples", "launch", "model", "parallel", "tests", "train")
GROUPS = ("model", "data", "schedule")
FILES = (".py", ".json", ".jsonl", ".txt", ".yaml", ".md", ".log", ".sh")
OF_COMMANDS = {"refine": RefineSettings, "scaling": ScalingSettings, "study": StudySettings, "depth": DepthSettings}
RECORDS = {
    "deepnarrow compare": "metrics.jsonl",
    "deepnarrow depth-study": "depth.json",
    "deepnarrow describe": "--picture step.png",
    "deepnarrow gqa-study": "study.json",
    "deepnarrow report": "report.html",
    "deepnarrow roofline": "roofline.json",
    "deepnarrow scaling": "scaling.json",
    "deepnarrow timeline": "timelines/step-",
    "wandb leet": "wandb/",
}
"""The file of a run or study that a command draws from, or writes its figures and pictures into."""
EXAMPLES = sorted((ROOT / "examples").glob("*/README.md"))
ids = pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=lambda page: str(page.relative_to(ROOT)))


def spans(text: str) -> list[str]:
    """The code in a text, each on one line."""
    return [" ".join(one.split()) for one in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site's generator make them."""
    titles = re.findall(r"^#+ +(.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def commands(page: Path) -> list[str]:
    """The commands of the console blocks, each on one line."""
    return [command.text for block in blocks_of(page) if block.kind == "console" for command in block.commands()]


def words_of(command: str) -> list[str]:
    return taken_apart(command)[0]


@cache
def preset_names(group: str) -> set[str]:
    folders = [ROOT / "conf" / group, *ROOT.glob(f"examples/*/{group}")]
    return {file.stem for folder in folders for file in folder.glob("*.yaml")}


def problems_of(overrides: list[str]) -> list[str]:
    """What is wrong with overrides: presets that are not there, keys and values that the schema does not take."""
    found, by_prefix = [], {}
    for text in overrides:
        key, _, value = text.lstrip("+~").partition("=")
        section = key.partition(".")[0]
        if key in GROUPS:
            if value not in preset_names(key) | {
                "mine",
                "slim",
                "57b",
            }:  # those that pages make, and one that is refused
                found.append(f"{text}: no such preset")
        elif section in OF_COMMANDS and "." in key:
            by_prefix.setdefault(section, []).append(text)
        elif not text.startswith(("+", "data.sources.")) and section not in ("hydra", "experiment"):
            by_prefix.setdefault("", []).append(text)
    for prefix, texts in by_prefix.items():
        kind = OF_COMMANDS.get(prefix, Config)
        found += settings_of(kind, f"{prefix}." if prefix else "", texts)[1]
    return found


@ids
def test_every_link_and_anchor_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for target in links:
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}; there are {sorted(anchors(file))}"


def test_every_page_is_on_the_site_and_led_to():
    site, index, readme = ((ROOT / name).read_text("utf-8") for name in ("zensical.toml", "docs/index.md", "README.md"))
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert f'"{page.name}"' in site, f"zensical.toml: {page.name} is in no section"
        if page.name != "index.md":
            assert f"({page.name})" in index and f"(docs/{page.name})" in readme, page.name
    for name in re.findall(r'"([\w-]+\.md)"', site):
        assert (ROOT / "docs" / name).is_file(), f"zensical.toml: {name}"


@ids
def test_every_picture_names_the_command_and_the_file_that_it_is_from(page):
    paragraphs = re.split(r"\n\s*\n", prose(page))
    for before, paragraph, behind in zip(["", *paragraphs[:-1]], paragraphs, [*paragraphs[1:], ""], strict=True):
        for path in re.findall(r"!\[[^]]*\]\(([^)\s]+)|<img[^>]*\bsrc=\"([^\"]+)", paragraph):
            caption = spans(f"{before}\n{paragraph}\n{behind}")
            assert any(
                any(one.startswith(command) for one in caption) and any(file in one for one in caption)
                for command, file in RECORDS.items()
            ), f"{page.name}: {''.join(path)}: beside it stands no command and file of {RECORDS}"


def test_every_table_of_a_study_names_the_file_that_it_is_from():
    """A table of figures is one of which a row has as many cells that begin with a digit as others."""
    found = 0
    for page in (ROOT / "docs" / f"{name}.md" for name in ("gqa", "gqa-study", "roofline", "depth-study", "scaling")):
        for section in re.split(r"^#+ ", prose(page), flags=re.M):
            cells = [row.strip("|").split("|") for row in re.findall(r"^\|.*\|$", section, re.M)]
            if any(2 * len([one for one in row if re.match(r" \d", one)]) >= len(row) > 2 for row in cells):
                found += 1
                title = section.splitlines()[0]
                assert any(file in section for file in RECORDS.values()), f"{page.name}: {title}: from which file?"
    assert found >= 3


@ids
def test_every_override_in_a_command_is_one(page):
    for command in commands(page):
        words = words_of(command)
        if (
            not any(word in ("deepnarrow", "train/pretrain.py", "./launch/quickstart") for word in words)
            or "57b" in command
        ):
            continue
        overrides = [word for word in words if re.match(r"[+~]?[a-z][\w.]*=", word)]
        assert problems_of(overrides) == [], f"{page.name}: {command}"


@ids
def test_every_key_in_the_prose_is_one(page):
    known = keys(Config, "") | {f"{name}.{key}" for name, kind in OF_COMMANDS.items() for key in keys(kind, "")}
    sections = {field.name for field in fields(Config)} | set(OF_COMMANDS)
    for span in spans(ours(page)):
        for word in span.split():
            match = re.fullmatch(r"'?([a-z]\w*(?:\.[a-z]\w*)+)(=.*)?", word)
            if not match or match[1].partition(".")[0] not in sections or "python -m" in span:
                continue
            if match[1].startswith(("data.sources.", "eval.sets.")) or match[1].endswith(FILES):
                continue
            assert match[1] in known, f"{page.name}: `{span}`: no key {match[1]}"


def test_what_stands_in_the_place_of_other_options_is_read():
    page = ROOT / "docs" / "coming-from.md"
    ours_there = [span for span in spans(ours(page)) if re.match(r"[a-z][\w.]*=", span) and "PATH" not in span]
    assert len(ours_there) > 50
    for span in ours_there:
        overrides = re.split(r" (?=[a-z_]+\.[a-z_.]+=)", span)
        assert problems_of([text.strip().replace('"', "") for text in overrides]) == [], span


def ours(page: Path) -> str:
    """The prose of a page; of tables with the options of other codebases the column that has ours."""
    text = prose(page)
    return text if page.name != "coming-from.md" else re.sub(r"^\|.*\|([^|]*)\|$", r"\1", text, flags=re.M)


def keys(kind: type, prefix: str) -> set[str]:
    """All keys of a dataclass, by their dotted names."""
    found = set()
    for field in fields(kind):
        found.add(f"{prefix}{field.name}")
        of = get_type_hints(kind)[field.name]
        if is_dataclass(of):
            found |= keys(of, f"{prefix}{field.name}.")
    return found


@ids
def test_every_verb_and_option_in_a_command_is_one(page, capsys):
    parser, verbs = make_parser()
    for command in commands(page):
        words = words_of(command)
        if "deepnarrow" not in words:
            continue
        verb, *rest = words[words.index("deepnarrow") + 1 :]
        if verb.startswith("-"):
            assert verb in parser._option_string_actions, f"{page.name}: {command}"
            continue
        assert verb in verbs, f"{page.name}: {command}"
        try:
            _, unknown = parser.parse_known_args([verb, *rest])
        except SystemExit:
            raise AssertionError(f"{page.name}: {command}: {capsys.readouterr().err}") from None
        left = [
            word
            for word in unknown
            if word.startswith("-") and not (verb == "train" and word in ("--cfg", "--resolve"))
        ]
        assert left == [], f"{page.name}: {command}"


@ids
def test_every_verb_in_the_prose_is_one(page):
    _, verbs = make_parser()
    for span in spans(prose(page)):
        if match := re.match(r"deepnarrow ([a-z][a-z-]*)", span):
            assert match[1] in verbs, f"{page.name}: `{span}`"
            options = re.findall(r"(?<!\S)(--[a-z-]+)", span)
            assert all(one in verbs[match[1]]._option_string_actions for one in options), f"{page.name}: `{span}`"


@ids
def test_every_file_of_the_code_that_is_named_is_there(page):
    for span in spans(prose(page)):
        for path in re.findall(rf"(?<![\w/.-])(?:{'|'.join(FLOORS)})/[\w./*-]*", span):
            of_others = page.name == "coming-from.md" or "://" in span
            # train/loss is a figure
            if of_others or not path.endswith(("/", ".py", ".yaml", ".csv", ".js", ".css", ".sh")):
                continue
            assert list(ROOT.glob(path.rstrip("./"))), f"{page.name}: {path}"


def test_the_architecture_names_what_there_is():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for folder in re.findall(r"^\| `([a-z]+/[a-z_]+/)`[^|]*\| (.*) \|$", text, re.M):
        for name in re.findall(r"`(\w+\.py)`", folder[1]):
            assert (ROOT / folder[0] / name).is_file(), f"architecture.md: {folder[0]}{name}"


def test_messages_in_troubleshooting_are_those_of_the_code():
    """The longest stretch of each quoted message without a value stands in the source."""
    code = "\n".join(
        path.read_text("utf-8") for floor in FLOORS if floor != "tests" for path in (ROOT / floor).rglob("*.py")
    )
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a text over several lines
    for row in re.findall(r"^\| (`.+?) \| ", (ROOT / "docs" / "troubleshooting.md").read_text("utf-8"), re.M):
        for span in spans(row):
            parts = re.split(r"…|\b[A-Z]\b|\b[A-Z]{3,}\b(?!_)|\d+|\.\.\.", span)
            longest = max((part.strip(" =:();,") for part in parts), key=len)
            assert len(longest) < 12 or longest in code, f"troubleshooting.md: `{span}`: {longest!r} is nowhere"


def test_the_reference_is_what_its_command_writes():
    written = (ROOT / "docs" / "configuration-reference.md").read_text("utf-8")
    assert written == docs_reference.page(), (
        "python -m launch.docs_reference > docs/configuration-reference.md mends it"
    )


def test_the_reference_has_every_key_with_its_default_and_text():
    page = docs_reference.page()
    for key in keys(Config, "") - {field.name for field in fields(Config)}:
        assert re.search(rf"^- \*\*`{re.escape(key)}=.*?`\*\* \([^)]+\)\. \S", page, re.M), key
    assert "- **`optimizer.lr=0.00042`** (number). Peak learning rate." in page
    assert "(1f1b or interleaved or zero_bubble or zbv or dualpipev)" in page


def test_the_front_page_is_one():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
