import json
import os
import signal
import sys

import pytest
from hydra._internal.utils import get_args_parser

from conf.compose import compose_overrides
from conf.search import split_options
from launch import cli, supervise
from train import preflight, pretrain


@pytest.fixture(autouse=True)
def no_process_is_started(monkeypatch):
    def fail(*arguments):
        raise AssertionError("a process would have been started")

    monkeypatch.setattr(supervise, "launch", fail)


def bad(capsys, *arguments):
    assert cli.main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_a_reader_that_has_seen_enough_is_no_fault(monkeypatch, capsys):
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert cli.main(["describe", "tiny"]) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


def test_another_broken_pipe_is_one(monkeypatch):
    def fail(options):
        raise BrokenPipeError("of a connection")

    monkeypatch.setitem(cli.VERBS, "describe", fail)
    with open(os.devnull, "w") as out, pytest.raises(BrokenPipeError, match="of a connection"):
        monkeypatch.setattr(sys, "stdout", out)
        cli.main(["describe", "tiny"])


def test_describe_67b_for_scripts(capsys):
    assert cli.main(["describe", "67b", "parallel.pp=12", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 67_425_001_472 == sum(found["parameters_by_part"].values())
    assert found["M"] == 72 * 95 * 8192**2 + 12 * 95 * 8192 * 4096
    assert found["kv_cache_bytes_per_token"] == 2 * 95 * 8 * 128 * 2
    assert found["attention"] == "GQA-8"
    assert [stage["blocks"] for stage in found["stages"]] == [8] * 11 + [7]
    assert sum(stage["parameters"] for stage in found["stages"]) == found["parameters"]
    matrices = found["parameters"] - 102400 * 8192 - 191 * 8192  # the lookup and the norms multiply nothing
    assert found["flops_per_token"] == 6 * matrices + 6 * 95 * 64 * 128 * 4096


def test_describe_sets_attention_side_by_side(capsys):
    assert cli.main(["describe", "67b", "--json"]) == 0
    choices = json.loads(capsys.readouterr().out)["attention_choices"]
    assert [choice["attention"] for choice in choices] == ["MHA", "GQA-8", "MQA"]
    for choice, heads in zip(choices, (64, 8, 1), strict=True):
        assert choice["kv_cache_bytes_per_token"] == 2 * 95 * heads * 128 * 2
        assert choice["kv_cache_bytes_per_sequence"] == choice["kv_cache_bytes_per_token"] * 4096
        assert choice["parameters"] == 67_425_001_472 + 2 * 95 * (heads - 8) * 128 * 8192
    assert cli.main(["describe", "tiny", "model.n_heads=6", "model.d_model=132", "model.n_kv_heads=3", "--json"]) == 0
    choices = json.loads(capsys.readouterr().out)["attention_choices"]
    assert [choice["n_kv_heads"] for choice in choices] == [6, 3, 1]


def test_describe_says_what_windows_leave_of_flops_and_cache(capsys):
    slides = ["model.window=1024", "model.window_pattern=sssssf"]
    assert cli.main(["describe", "67b", *slides, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    full, layers = 95 // 6, 95
    assert (found["window"], found["sliding_layers"]) == (1024, layers - full)
    own = next(choice for choice in found["attention_choices"] if choice["attention"] == "GQA-8")
    held = 2 * 8 * 128 * 2 * (full * 4096 + (layers - full) * 1024)
    assert own["kv_cache_bytes_per_sequence"] == found["kv_cache_bytes_per_sequence"] == held
    matrices = found["parameters"] - 102400 * 8192 - 191 * 8192
    seen = full * 4096**2 / 2 + (layers - full) * (1024 * 4096 - 1024**2 / 2)
    assert found["flops_per_token"] == 6 * matrices + 12 * 64 * 128 * seen / 4096
    assert found["M"] == 72 * 95 * 8192**2 + 12 * 95 * 8192 * 4096
    assert cli.main(["describe", "67b", *slides]) == 0
    said = capsys.readouterr().out
    assert "80 layers with a window of 1024" in said and f"{2 * 8 * 128 * 2 * full:,}" in said
    assert cli.main(["describe", "67b", "model.window=4096"]) == 2
    assert "model.window=4096: hides nothing" in capsys.readouterr().err


def test_describe_for_people_takes_presets_and_overrides(capsys):
    assert cli.main(["describe", "7b", "model.n_kv_heads=8", "parallel.pp=2"]) == 0
    said = capsys.readouterr().out
    for part in ("GQA-8", "embedding, blocks 0-15", "blocks 16-29, head", "KV cache"):
        assert part in said


def test_describe_takes_overrides_on_both_sides_of_an_option(capsys):
    assert cli.main(["describe", "67b", "--json", "parallel.pp=4"]) == 0
    assert len(json.loads(capsys.readouterr().out)["stages"]) == 4


def test_describe_judges_every_setting_that_it_prints(capsys):
    assert "train.seq_len=0" in bad(capsys, "describe", "tiny", "train.seq_len=0")


def test_describe_counts_the_steps_of_each_batch_and_the_tokens_of_each_source(capsys):
    mixture = "data.sources={web: {path: /web, weight: 3}, code: {path: /code, weight: 1}}"
    stages = "data.stages=[{until: 1e9}, {until: 2e9, weights: {code: 1}, seq_len: 2048}]"
    ramp = ["train.global_batch='0:100 5e8:200'", "train.total_tokens=2e9"]
    assert cli.main(["describe", "7b", mixture, stages, *ramp, "parallel.pp=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = [(of["steps"], of["global_batch"], of["seq_len"], of["stage"]) for of in found["length"]]
    assert sizes == [(1221, 100, 4096, 0), (611, 200, 4096, 0), (2440, 200, 2048, 1)]
    assert found["pipeline"]["micro_batches"] == 200  # the batch that the run ends with
    web, code = found["sources"]
    assert (web["shares"], code["shares"]) == ([0.75, 0.0], [0.25, 1.0])
    steps = sum(steps * batch * seq_len for steps, batch, seq_len, _ in sizes)
    assert web["tokens"] + code["tokens"] == steps and abs(web["tokens"] - 0.75 * (1221 + 2 * 611) * 409_600) < 4096
    assert cli.main(["describe", "7b", mixture, stages, *ramp]) == 0
    said = capsys.readouterr().out
    assert "from step 1,222, after 500,121,600 tokens: 611 steps of 200 x 4096 tokens, data stage 0" in said
    assert f"code: {code['tokens']:,} tokens; 25.00% then 100.00%" in said


def test_every_verb_has_a_help_text(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    overview = capsys.readouterr().out
    for verb in cli.VERBS:
        assert verb in overview
        with pytest.raises(SystemExit, match="0"):
            cli.main([verb, "--help"])
        assert f"deepnarrow {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["parallel.pp=5"], ["parallel.pp=5", "4 layers"]),
        (["model.d_model=33"], ["model.n_heads=4", "model.d_model=33"]),
        (["model.n_kv_heads=3"], ["model.n_kv_heads=3", "model.n_kv_heads=2 or model.n_kv_heads=4"]),
        (["train.global_batch=7"], ["train.global_batch=7", "train.global_batch=6 or train.global_batch=8"]),
        (["train.global_batc=8"], ["train.global_batc=8", "train.global_batch"]),
        (["model=tinny"], ["model=tinny", "model=tiny"]),
        (["data.path=/no/such/folder"], ["data.path=/no/such/folder"]),
        (["train.seq_len=65"], ["train.seq_len=65", "model.max_seq_len=64"]),
        (["model.vocab_size=100", "data.tokenizer_vocab_size=300"], ["model.vocab_size=100", "300"]),
        (["parallel.pp=5", "model.n_kv_heads=3", "data.path=/no/such"], ["pp=5", "n_kv_heads=3", "data.path=/no/such"]),
    ],
)
def test_impossible_runs_end_before_any_process(changes, said, overrides, capsys):
    text = bad(capsys, "train", *overrides, *changes)
    assert all(part in text for part in said), text
    assert len(text.splitlines()) == (3 if len(changes) == 3 else 1), text


def test_an_empty_corpus_and_one_shorter_than_a_sequence(overrides, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "empty" in bad(capsys, "train", *overrides, f"data.path={tmp_path / 'empty'}")
    (tmp_path / "short").mkdir()
    for i in range(3):
        (tmp_path / "short" / f"{i}.txt").write_text("a few words")
    text = bad(capsys, "train", *overrides, f"data.path={tmp_path / 'short'}")
    assert "train.seq_len=32" in text


def test_a_run_folder_that_cannot_be_made(overrides, tmp_path, capsys):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        text = bad(capsys, "train", *overrides, f"hydra.run.dir={folder}", "parallel.pp=5")
        assert f"hydra.run.dir={folder}: {tmp_path / 'file'}: not a folder" in text and "parallel.pp=5" in text
    assert cli.main(["prepare", *overrides, f"hydra.run.dir={tmp_path / 'file'}"]) == 0  # writes no run


def test_ranks_are_told_the_run_folder_and_not_how_to_name_it(overrides, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(supervise, "launch", lambda *arguments: started.append(arguments) or 0)
    named = f"hydra.run.dir='{tmp_path}/it\\'s a run/${{now:%f}}'"
    assert cli.main(["train", *overrides, named, "--config-name", "config", "hydra.job.chdir=true"]) == 0
    ((arguments, _, run_dir, _),) = started
    assert "now:" not in str(run_dir) and run_dir.parent == tmp_path / "it's a run"
    options, told = split_options(arguments)
    assert compose_overrides(told).run_dir == run_dir
    # Hydra's own parser takes no override behind an option, and its chdir would move relative paths.
    parsed = get_args_parser().parse_args(arguments)
    assert parsed.overrides == told and told[-1] == "hydra.job.chdir=false" and options.config_name == "config"


def test_ctrl_c_while_data_is_prepared_is_no_traceback(overrides, monkeypatch, capsys):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(preflight, "prepare_run", stop)
    assert cli.main(["train", *overrides]) == cli.main(["prepare", *overrides]) == 130
    assert "stopped" in capsys.readouterr().err


def test_hydras_questions_are_answered_by_one_rank(monkeypatch, capsys):
    for rank, answers in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(sys, "argv", [])
        pretrain.main(["--local_rank=0", "parallel.pp=3", "--cfg", "job"])
        assert capsys.readouterr().out.count("pp: 3") == answers


def test_prepare_tells_where_the_data_is_and_train_finds_it(overrides, monkeypatch, capsys, tmp_path):
    assert cli.main(["prepare", *overrides]) == 0
    said = capsys.readouterr().out
    assert "training and" in said and "tokenizer.json" in said
    assert "a run of 500,224 tokens takes\nfiles  " in said and "500,224 tokens, 100.00%; " in said
    started = []
    monkeypatch.setattr(supervise, "launch", lambda *arguments: started.append(arguments) or 0)
    assert cli.main(["train", *overrides, "parallel.pp=2", f"hydra.run.dir={tmp_path}"]) == 0
    ((arguments, processes, run_dir, _),) = started
    assert processes == 2 and run_dir == tmp_path and "parallel.pp=2" in arguments


def test_describe_says_the_epochs_of_sources_that_are_prepared(tmp_path, capsys):
    for name, lines in (("web", 40), ("code", 10)):
        texts = [json.dumps({"text": f"{name} document {line}: " + "some words of it, " * 9}) for line in range(lines)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(texts))
    sources = f"{{web: {{path: {tmp_path}/web.jsonl}}, code: {{path: {tmp_path}/code.jsonl}}}}"
    recipe = ["train.total_tokens=32000", "train.seq_len=32", "train.global_batch=4", "schedule.warmup_steps=1"]
    settings = [f"data.sources={sources}", "data.val_fraction=0.2", "data.workers=1", "data.tokenizer_vocab_size=300"]
    command = ["model=tiny", *recipe, *settings, f"data.cache_dir={tmp_path}/cache"]
    assert cli.main(["describe", *command]) == 0
    assert "epochs of each source: not prepared here" in capsys.readouterr().out
    assert cli.main(["prepare", *command]) == 0
    said = capsys.readouterr().out
    assert cli.main(["describe", *command, "train.max_steps=2", "--json"]) == 0  # of the whole run, a trial apart
    for of in json.loads(capsys.readouterr().out)["sources"]:
        assert of["tokens"] == 16_000 and of["epochs"] > 1
        assert f"{of['epochs']:.3g} epochs of {of['available']:,} (repeated)" in said
    (tmp_path / "code.jsonl").write_text(json.dumps({"text": "another"}))
    assert cli.main(["describe", *command]) == 0
    assert "epochs of each source: not prepared here" in capsys.readouterr().out
