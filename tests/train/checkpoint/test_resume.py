"""Which checkpoint, and whether it fits: decided before a process is started."""

import json
from dataclasses import asdict

import pytest

from conf.schema import to_jsonable
from model.problems import BadInput
from tests.shapes import preset
from train.checkpoint import manifest
from train.checkpoint.folder import name_of
from train.checkpoint.manifest import Damaged, Manifest
from train.checkpoint.resume import Start, check, find, trained_with_document_mask, warnings


def checkpoint(run_dir, step, config, origin=None, older_than=()):
    """A checkpoint without weights; `older_than` names keys of data and model that its configuration lacks."""
    settings = to_jsonable(asdict(config))
    for section in ("data", "model"):
        settings[section] = {key: value for key, value in settings[section].items() if key not in older_than}
    path = run_dir / "checkpoints" / name_of(step)
    path.mkdir(parents=True)
    (path / "tokenizer.json").write_text("{}")
    files = {"tokenizer.json": {"bytes": 2, "sha256": manifest.checksum(path / "tokenizer.json")}}
    manifest.write(
        path,
        Manifest(
            step=step,
            adam_step=step,
            tokens=step * 2048,
            data="corpus",
            config=settings,
            layout={},
            code="",
            written="",
            origin=origin,
            tensors={"exp_avg/head.norm.weight": {"shape": [1], "pieces": []}},
            files=files,
        ),
    )
    return path


@pytest.fixture
def run_dir(tmp_path):
    for step in (4, 8):
        checkpoint(tmp_path / "run", step, preset("tiny"))
    return tmp_path / "run"


def steps(start):
    return [int(path.name[5:]) for path in start.candidates]


def test_auto_takes_the_run_folders_own_newest_first(run_dir, tmp_path):
    start = find("auto", run_dir)
    assert steps(start) == [8, 4] and start.own and not start.rewind
    assert find("auto", tmp_path / "new") == Start()
    assert find("never", run_dir) == Start()


def test_a_path_may_be_a_run_a_folder_of_checkpoints_one_of_them_or_latest(run_dir, tmp_path):
    (run_dir / "checkpoints" / "latest").symlink_to(name_of(8))
    new = tmp_path / "new"
    for path in (run_dir, run_dir / "checkpoints"):
        assert steps(find(str(path), new)) == [8, 4]
    assert steps(find(str(run_dir / "checkpoints" / "latest"), new)) == [8]
    start = find(str(run_dir / "checkpoints" / name_of(4)), new)
    assert steps(start) == [4] and not start.own and start.origin.endswith(name_of(4))


def test_the_same_command_with_a_path_goes_on_from_what_came_of_it(run_dir, tmp_path):
    named = str(run_dir / "checkpoints" / name_of(4))
    new = tmp_path / "new"
    checkpoint(new, 6, preset("tiny"), origin=named)
    start = find(named, new)
    assert steps(start) == [6] and start.own and start.origin == named
    assert steps(find("auto", new)) == [6] and find("auto", new).origin == named
    assert steps(find(str(run_dir / "checkpoints" / name_of(8)), new)) == [8]


def test_an_earlier_one_of_its_own_is_a_step_back(run_dir):
    named = run_dir / "checkpoints" / name_of(4)
    start = find(str(named), run_dir)
    assert steps(start) == [4] and start.own and start.rewind
    assert not find(str(run_dir / "checkpoints" / name_of(8)), run_dir).rewind
    checkpoint(run_dir, 12, preset("tiny"), origin=str(named))
    assert steps(find(str(named), run_dir)) == [12, 8, 4]


@pytest.mark.parametrize("path", ["nowhere", "run/checkpoints/step-00000005", "empty"])
def test_where_there_is_none_it_says_what_would_work(path, run_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput) as error:
        find(str(tmp_path / path), tmp_path / "new")
    (problem,) = error.value.problems
    assert problem.startswith(f"resume={tmp_path / path}: no checkpoint is there; ")
    assert ("step-00000008" in problem) == ("step" in path) and "resume=never" in problem


def test_another_model_is_refused_with_every_key_that_differs(run_dir):
    other = preset("tiny", "model.n_layers=9", "model.vocab_size=5000", "model.d_model=64", "train.skip_samples=-1")
    problems = check(other, find("auto", run_dir))
    assert [problem.partition("=")[0] for problem in problems] == [
        "model.n_layers",
        "model.d_model",
        "model.vocab_size",
        "train.skip_samples",
    ]
    assert "model.n_layers=9: the checkpoint" in problems[0] and "has 8; model.n_layers=8 would work" in problems[0]
    slides = check(preset("tiny", "model.window=64", "model.window_pattern=sf"), find("auto", run_dir))
    assert "model.window=64: the checkpoint" in slides[0] and "has null; model.window=null would work" in slides[0]
    assert slides[1].startswith("model.window_pattern=sf: ") and len(slides) == 2
    for changes in (
        ["model.attention=reference", "model.init_std=0.1", "parallel.pp=4", "optimizer.lr=1"],
        OTHER_COURSE,
    ):
        assert check(preset("tiny", *changes), find("auto", run_dir)) == []


OTHER_COURSE = [
    *["train.global_batch='0:4 9e4:16'", "train.seq_len=128", "data.stages=[{until: 5e4, seq_len: 64}, {until: 1e13}]"],
    "data.sources={web: {path: /web}, code: {path: /code}}",
]


def test_what_is_left_to_train_is_counted_from_what_was_trained_on(run_dir, tmp_path):
    """Eight steps of 8 x 256 tokens are 16,384."""
    start = find(str(run_dir), tmp_path / "new")
    ends = ["train.total_tokens=18000", "train.global_batch=4", "train.seq_len=128"]
    assert check(preset("tiny", *ends), start) == []
    (problem,) = check(preset("tiny", *ends, "train.total_tokens=16000"), start)
    assert "is of step 8 and the run ends with step 8, so that nothing is left to train" in problem
    # A ramp-up or stages that cannot be are said where the configuration is checked.
    assert check(preset("tiny", "train.global_batch='0:8 x'", "data.stages=[{until: -1}]"), start) == []


@pytest.mark.parametrize(
    ("settings", "older_than", "mask"),
    [
        (["data.document_mask=true"], (), True),
        (["data.document_mask=false"], (), False),
        ([], ("document_mask", "sources", "stages", "window", "window_pattern"), False),
    ],
)
def test_documents_stay_apart_or_together_as_the_run_was_trained(settings, older_than, mask, tmp_path):
    checkpoint(tmp_path / "run", 8, preset("tiny", *settings), older_than=older_than)
    start = find("auto", tmp_path / "run")
    found, said = trained_with_document_mask(start)
    assert found is mask and (said is None) is mask
    assert mask or ("up to step 8" in said and f"data.document_mask=true resume={start.candidates[0]} would" in said)
    then = manifest.read(start.candidates[0])
    assert warnings(preset("tiny", f"data.document_mask={str(mask).lower()}"), then, "corpus") == []
    (line,) = warnings(preset("tiny", f"data.document_mask={str(not mask).lower()}"), then, "corpus")
    assert line.startswith(f"data.document_mask={not mask}: the run had {mask}")
    assert trained_with_document_mask(Start()) == (True, None)


def test_another_tokenizer_is_refused(run_dir, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{ }")
    (problem,) = check(preset("tiny"), find("auto", run_dir), tmp_path / "tokenizer.json")
    own = run_dir / "checkpoints" / name_of(8) / "tokenizer.json"
    assert problem.startswith("data.tokenizer=null: ") and f"data.tokenizer={own} would work" in problem
    assert check(preset("tiny"), find("auto", run_dir), own) == []


def test_what_changes_the_curve_is_a_warning(run_dir):
    found = manifest.read(run_dir / "checkpoints" / name_of(8))
    assert warnings(preset("tiny", "parallel.pp=2", "train.val_every=7"), found, "corpus") == []
    (line,) = warnings(preset("tiny", "optimizer.lr=1e-4"), found, "corpus")
    assert line == "optimizer.lr=0.0001: the run had 0.003 up to step 8"
    (line,) = warnings(preset("tiny"), found, "another corpus")
    assert "order of samples" in line


def test_a_manifest_that_cannot_be_read_is_passed_over_until_none_is_left(run_dir):
    newest, older = find("auto", run_dir).candidates
    (newest / "manifest.json").write_text("{}")
    assert len(check(preset("tiny", "model.n_layers=9"), find("auto", run_dir))) == 1
    (older / "manifest.json").unlink()
    (problem,) = check(preset("tiny"), find("auto", run_dir))
    assert "no sound checkpoint" in problem and "step-00000008" in problem and "resume=never would start" in problem


def test_every_bit_of_a_manifest_counts(run_dir):
    path = run_dir / "checkpoints" / name_of(8) / "manifest.json"
    content = path.read_bytes()
    read = manifest.read(path.parent)
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        try:
            assert manifest.read(path.parent) == read, place  # between the words
        except Damaged:
            continue


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd"])
def test_a_manifest_may_not_lead_outside_its_folder(name, run_dir):
    path = run_dir / "checkpoints" / name_of(8)
    found = manifest.read(path)
    found.files[name] = {"bytes": 1, "sha256": ""}
    manifest.write(path, found)
    with pytest.raises(Damaged, match="outside"):
        manifest.read(path)


def test_another_format_is_refused_and_not_called_damaged(run_dir, monkeypatch):
    monkeypatch.setattr(manifest, "READ", (manifest.FORMAT + 1,))
    with pytest.raises(BadInput, match=f"written in format {manifest.FORMAT}"):
        check(preset("tiny"), Start((run_dir / "checkpoints" / name_of(8),), own=True))


def test_checkpoints_of_the_first_format_are_read(run_dir):
    """They have no history: one batch and one length all along."""
    path = run_dir / "checkpoints" / name_of(8)
    body = asdict(manifest.read(path))
    del body["history"]
    lines = {"sha256": manifest._digest({**body, "format": 1}), **body, "format": 1}
    (path / "manifest.json").write_text(json.dumps(lines))
    found = manifest.read(path)
    assert (found.format, found.history, found.step) == (1, None, 8)
    assert check(preset("tiny"), Start((path,), own=True)) == []
