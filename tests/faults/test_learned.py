"""What was learned is not lost: runs that diverge, that fail at their end, whose disk is full, whose folder goes."""

import gzip
import json
import math
import shutil
from functools import cache

import pytest
from safetensors.torch import load_file, save_file

from conf.validate import Machine, validate
from tests.launch.wandb_parts import logged_steps
from tests.ranks import nursery
from tests.shapes import preset
from tests.train.checkpoint import runs
from tests.train.test_strict_json import strictly
from train.checkpoint import manifest
from train.wandb_file import last_offline_step

DIVERGED, LOST, STEPS = 3, 1, 20
NEEDS = [
    *[f"train.max_steps={STEPS}", "schedule.warmup_steps=0", "train.val_every=0", "train.val_sequences=4"],
    *["sample.tokens=0", "checkpoint.keep_last=100", "checkpoint.every_steps=2", "wandb.mode=disabled"],
]


def run(folder, fault, *overrides, num=1, code=0):
    """A run to which something happens; what it said."""
    told = [fault[0], str(len(fault) - 1), *fault[1:]] if fault else []
    module = "tests.faults.faulty" if fault else "train.pretrain"
    folder.mkdir(parents=True, exist_ok=True)
    given = {override.partition("=")[0] for override in overrides}
    needs = [one for one in [*NEEDS, f"hydra.run.dir={folder}"] if one.partition("=")[0] not in given]
    ranks = nursery().start(module, num, [*told, *needs, *overrides], folder)
    codes = ranks.wait(60)
    said = "".join((folder / f"rank{rank}.log").read_text() for rank in range(num))
    assert code in codes and set(codes) <= {code, -9}, f"{codes}\n{said[-3000:]}"
    return said


def summary(folder):
    return strictly((folder / "summary.json").read_text())


def steps_saved(folder):
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-????????"))


def sound(checkpoint):
    return all(tensor.isfinite().all() for tensor in runs.whole(checkpoint).values())


FP32 = ["optimizer.lr=1e38", "optimizer.clip=null", "sample.tokens=4", "checkpoint.every_steps=1"]
WATCHED = ["parallel.pp=2", "train.profile=[6]", "train.timeline_at=[6]", "optimizer.clip=inf", "wandb.mode=offline"]
DIVERGENCES = {  # a fault, settings, processes, the step that it ends at, and what it goes on from
    "A1 weights beyond fp32": ([], FP32, 1, 2, None, "the weights are not finite"),
    "A1 a weight of one stage": (["weights", "7", "1"], ["parallel.pp=2"], 2, 8, 6, "the weights are not finite"),
    "A1 a moment, which no loss has": (["moment", "20"], [], 1, 20, 18, "the weights are not finite"),
    "A1 gradients alone": (["gradients", "5", "99"], ["train.max_skipped=6", *WATCHED], 2, 10, 4, "6 steps in a row"),
    "A1 losses of finite weights": (["losses", "4"], ["train.max_skipped=6"], 1, 10, 2, "6 steps in a row"),
}


@pytest.fixture(scope="module")
def diverged(overrides, tmp_path_factory):
    """From a case to the folder of its run, and what that said."""

    @cache
    def of_case(case):
        fault, asked, num, *_ = DIVERGENCES[case]
        folder = tmp_path_factory.mktemp("diverged")
        more = ["checkpoint.keep_last=2", f"alerts.command=[tee,-a,'{folder}/told']"]
        return folder, run(folder, fault, *overrides, *more, *asked, num=num, code=DIVERGED)

    return of_case


@pytest.mark.launch
@pytest.mark.parametrize("case", DIVERGENCES)
def test_a_run_that_diverges_stops_says_so_and_keeps_what_is_finite(case, diverged):
    (*_, ends, newest, why), (folder, said) = DIVERGENCES[case], diverged(case)
    found = summary(folder)
    assert not found["complete"] and found["diverged"] and why in found["reason"] and found["steps"] == ends
    assert f"--- diverged at step {ends} of {STEPS}" in said and "a lower optimizer.lr" in said
    assert "Traceback" not in said and runs.metrics(folder)[-1]["step"] == ends
    assert all(sound(runs.saved(folder, step)) for step in steps_saved(folder))
    assert max(steps_saved(folder), default=None) == newest
    assert (f"train.skip_steps=[{ends - 5}-{ends}] passes over it" in said) is ("6 steps in a row" in why)
    assert ("no checkpoint is finite" if newest is None else f"goes on from step {newest}") in said
    told = [json.loads(one) for one in (folder / "told").read_text().replace("}{", "}\n{").splitlines()]
    titles = [alert["title"] for alert in told]
    assert titles[-1] == "diverged" and ("steps skipped" in titles) is ("6 steps in a row" in why)
    assert told[-1]["step"] == ends and why in told[-1]["text"]


@pytest.mark.launch
def test_a5_every_json_file_of_a_run_is_strict(diverged):
    folder, _ = diverged("A1 gradients alone")
    kinds = set()
    for path in folder.rglob("*"):
        if not path.is_file() or not path.name.endswith((".json", ".jsonl", ".json.gz")):
            continue
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for part in content.splitlines() if path.suffix == ".jsonl" else [content]:
            strictly(part)
        kinds.add(f"{path.parent.name.partition('-')[0]}/{path.name.partition('-')[0]}")
    assert {"step/manifest.json", "profiles/step", "timelines/step"} <= kinds
    assert {f"{folder.name.partition('-')[0]}/{name}" for name in ("metrics.jsonl", "summary.json")} <= kinds


@pytest.mark.launch
@pytest.mark.parametrize("weights", ["finite", "not finite"])
def test_a1_a_run_goes_on_from_the_last_checkpoint_that_is_finite(weights, diverged, overrides, tmp_path):
    shutil.copytree(diverged("A1 gradients alone")[0], tmp_path, symlinks=True, dirs_exist_ok=True)
    if weights == "not finite":  # as an earlier version may have left it
        spoil(runs.saved(tmp_path, 4))
    said = run(tmp_path, [], *overrides, "parallel.pp=2", "train.max_steps=6", num=2)
    newest = 4 if weights == "finite" else 2
    assert f"going on after step {newest}" in said and "the run diverged" in said
    assert ("set aside as step-00000004.diverged" in said) is (weights == "not finite")
    assert summary(tmp_path)["complete"] and not summary(tmp_path)["diverged"] and sound(runs.saved(tmp_path, 6))
    assert all(math.isfinite(step["loss"]) for step in runs.curve(tmp_path).values())


def spoil(checkpoint):
    """Put one NaN into a checkpoint, whose checksums are then those of that."""
    path = checkpoint / "rank00001.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = math.nan
    save_file(tensors, path)
    body = json.loads((checkpoint / "manifest.json").read_text())
    del body["sha256"]
    body["files"][path.name] = {"bytes": path.stat().st_size, "sha256": manifest.checksum(path)}
    manifest.write(checkpoint, manifest.Manifest(**body))


@pytest.mark.launch
def test_single_steps_that_are_skipped_end_nothing_and_put_no_save_off_for_good(overrides, tmp_path):
    said = run(tmp_path, ["gradients", "5", "8"], *overrides, "train.max_skipped=5", "train.max_steps=12")
    assert said.count("was skipped") == 1 and "where that goes on, a lower optimizer.lr" in said
    assert summary(tmp_path)["complete"] and summary(tmp_path)["skipped_steps"] == 4
    assert steps_saved(tmp_path) == [2, 4, 9, 10, 12]  # not 6 and 8, whose weights 4 has


FAILURES = [  # what fails, in which of two runs, and what is said of it
    pytest.param("samples", 0, "no samples: RuntimeError: as the test asks", id="A2 samples"),
    pytest.param("timeline", 0, "the timeline of step 3 could not be kept (as the test asks)", id="A2 a picture"),
    pytest.param("profile", 0, "the profile of step 3 on rank 0 could not be kept (as the", id="A2 a profile"),
    pytest.param("wandb", 0, "W&B has ended (as the test asks)", id="A2 an upload"),
    pytest.param("draw", 1, "no samples: RuntimeError: as the test asks", id="A2 a decoder"),
    pytest.param("profiler", 1, "step 3 on rank 0 could not be profiled (as the test asks)", id="A2 a profiler"),
    pytest.param("wandb start", 1, "W&B could not be started", id="A2 W&B"),
]


@pytest.fixture(scope="module")
def troubled(overrides, tmp_path_factory):
    """Two runs of two ranks, in each of which several things fail; their folders, and what they said."""
    found = []
    asked = ["sample.tokens=4", "train.profile=[3]", "train.timeline_at=[3]", "wandb.mode=offline"]
    asked += ["train.max_steps=4", "checkpoint.every_steps=null", "parallel.pp=2"]
    for number in range(2):
        fault = ["fails", *(case.values[0] for case in FAILURES if case.values[1] == number)]
        folder = tmp_path_factory.mktemp("troubled")
        found.append((folder, run(folder, fault, *overrides, *asked, num=2)))
    return found


@pytest.mark.launch
@pytest.mark.parametrize(("what", "number", "warning"), FAILURES)
def test_what_fails_beside_training_is_a_warning(what, number, warning, troubled):
    folder, said = troubled[number]
    assert warning in said and "Traceback" not in said
    assert steps_saved(folder) == [4] and summary(folder)["complete"]


@pytest.mark.launch
def test_a_save_that_has_begun_ends_when_the_run_fails(overrides, tmp_path):
    said = run(tmp_path, ["step_fails", "3"], *overrides, "parallel.pp=2", num=2, code=LOST)
    assert "RuntimeError: as the test asks" in said and "step 2 saved" in said
    manifest.check_files(runs.saved(tmp_path, 2), manifest.read(runs.saved(tmp_path, 2)))
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("sample.prompts=['def ','caf\udce9']", "sample.prompts=caf\\udce9"),
        ("name='caf\udce9'", "name=caf\\udce9"),
        ("data.text_field='caf\udce9'", "data.text_field=caf\\udce9"),
        ("wandb.tags=['caf\udce9']", "wandb.tags=caf\\udce9"),
        ("data.document_separator='\udce9'", "data.document_separator=\\udce9"),
    ],
    ids=lambda text: f"A2 {text!a}",
)
def test_text_that_has_no_utf8_form_is_refused(override, key):
    _, problems = validate(preset("tiny", override), Machine(gpus=0))
    assert len(problems) == 1 and problems[0].startswith(f"{key}: is not UTF-8; ")
    problems[0].encode()


@pytest.mark.launch
def test_a2_a_wandb_process_that_is_stopped_costs_no_step_and_no_record(overrides, tmp_path):
    """Its client would wait for it for good: for room in a socket (tests/train/test_wandb_log.py), and at the end."""
    steps, wandb = 6, ["wandb.mode=offline", "wandb.finish_seconds=3"]
    more = ["checkpoint.enabled=false", f"train.max_steps={steps}"]
    said = run(tmp_path, ["wandb_stops", "3"], *overrides, *more, *wandb)
    assert said.count("W&B has not taken all records within 3 s (wandb.finish_seconds)") == 1
    assert summary(tmp_path)["complete"] and list(runs.curve(tmp_path)) == list(range(1, steps + 1))
    assert logged_steps(tmp_path / "wandb") == list(range(1, steps + 1))
    assert summary(tmp_path)["wandb"]["parts"] == 2 and "lacks_records" not in summary(tmp_path)["wandb"]


@pytest.mark.launch
def test_a3_a_disk_that_stays_full_costs_no_step_and_the_exit_code_tells(overrides, tmp_path):
    more = ["checkpoint.enabled=false", "wandb.mode=offline", "train.log_every=1"]
    said = run(tmp_path, ["full", "4200"], *overrides, *more, code=LOST)  # the output of the rank is a file as well
    assert said.count("metrics.jsonl cannot be written ([Errno 27] File too large)") == 1
    assert "Traceback" not in said and "Logging error" not in said and f"step {STEPS}/{STEPS}" in said
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    whole = [strictly(line) for line in lines if line.endswith("\n")]
    assert summary(tmp_path)["complete"] and summary(tmp_path)["missing_records"] == STEPS - len(whole) > 0


@pytest.mark.launch
def test_a3_what_a_full_disk_did_not_take_is_written_later(overrides, tmp_path):
    more = ["checkpoint.enabled=false", "train.log_every=1"]
    said = run(tmp_path, ["full", "3000", "17"], *overrides, *more)
    assert "cannot be written" in said and "metrics.jsonl is written again" in said
    assert list(runs.curve(tmp_path)) == list(range(1, STEPS + 1)) and not summary(tmp_path)["missing_records"]
    log = (tmp_path / "pretrain.log").read_text()
    assert all(log.count(f"step {step}/{STEPS} ") == 1 for step in range(1, STEPS + 1))


@pytest.mark.launch
def test_a4_a_run_folder_that_is_deleted_is_made_again_and_the_exit_code_tells(overrides, tmp_path):
    folder = tmp_path / "run"
    more = ["wandb.mode=offline", "checkpoint.every_steps=8", "train.log_every=1", f"hydra.run.dir={folder}"]
    said = run(tmp_path, ["deleted", str(folder), "10"], *overrides, *more, code=LOST)
    assert said.count(f"{folder} was deleted or moved while the run goes on") == 1 and "Traceback" not in said
    assert said.count("was deleted or moved") == 2  # and that W&B's folder was
    assert said.index("was deleted") < said.index("step 11/20")
    assert list(runs.curve(folder)) == list(range(1, STEPS + 1))
    log = (folder / "pretrain.log").read_text()
    assert all(log.count(f"step {step}/{STEPS} ") == 1 for step in range(1, STEPS + 1))
    assert {path.name for path in (folder / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert steps_saved(folder) == [11, 16, 20] and summary(folder)["complete"]
    run_id = (folder / "wandb" / "id").read_text().strip()
    assert last_offline_step(folder / "wandb", run_id) == STEPS
