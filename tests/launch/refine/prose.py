"""English that no filter removes, and what tests read of a result."""

import json
import random
from pathlib import Path

import zstandard

from conf.train_settings import DataConfig, Source
from train.data.corpus import documents
from train.data.tally import Tally


def _words(text: str) -> list[str]:
    return text.split()


WORDS = _words("""time people way water day man government work life woman system case part group number world house
area company problem service place hand party school country point week member end state word family fact head
month side business night eye home question information power change interest development money book car war
history city market office door council table court letter street music river station garden winter summer
island mountain teacher doctor farmer captain village forest bridge kitchen window paper picture story machine
engine""")
VERBS = _words("""saw found made took gave left kept built lost wrote bought carried followed painted crossed""")
HOW = _words("""another one every some any this that my our their his her no many both""")
WHERE = _words("""near with behind inside under before after without beyond around against from""")
WHEN = _words("""Then once often today when because although since while suddenly later perhaps and but yet""")


def prose(seed: int, sentences: int = 14) -> str:
    """English of random words, with no run of words that comes back."""
    draw = random.Random(seed)
    said = []
    for _ in range(sentences):
        a, b, c, d = draw.sample(WORDS, 4)
        parts = [f"the {a} of {b}", draw.choice(VERBS), f"{draw.choice(HOW)} {c}", f"{draw.choice(WHERE)} {d}"]
        said.append(" ".join([draw.choice(WHEN), *parts]).capitalize() + ".")
    return " ".join(said)


def texts(folder: Path) -> list[str]:
    return list(documents(DataConfig(source=Source.files, path=str(folder)), Tally()))


def lines_of(out: Path) -> list[dict]:
    files = sorted((out / "documents").rglob("*.jsonl.zst"))
    return [json.loads(line) for file in files for line in zstandard.open(file, "rt", encoding="utf-8")]
