"""A real run out to Hugging Face and back, regrouped, and trained on."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.cli import main
from model.regroup import Method
from model.transformer import full_shapes
from model.weights import streamed_logits
from tests.ranks import run_ranks
from tests.train.checkpoint import runs
from train.pretrained import open_source, real_tokens


@pytest.fixture(scope="module")
def run_dir(overrides, tmp_path_factory):
    """A multi-head model, trained in two stages and saved."""
    folder = tmp_path_factory.mktemp("multi-head")
    runs.finish(
        folder,
        2,
        *overrides,
        "model.n_kv_heads=4",
        "parallel.pp=2",
        "train.total_tokens=3072",
        "schedule.warmup_steps=2",
    )
    return folder


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    assert main(["export", str(run_dir), str(folder), "--max-shard-gb", "0.0001"]) == 0
    return folder


def assert_same_weights(one, two):
    one, two = open_source(one).weights, open_source(two).weights
    assert one.config == two.config
    for name in full_shapes(one.config):
        assert torch.equal(one.read(name), two.read(name)), name


@pytest.mark.launch
def test_transformers_takes_the_export_with_its_tokenizer(run_dir, exported):
    source = open_source(run_dir)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    tokens_BL = real_tokens(source, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens_BL).logits, streamed_logits(source.weights, tokens_BL), rtol=1e-5, atol=1e-5
        )
    text = "def one(x):\n    return x + 1  # é\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (
        model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<｜end▁of▁sentence｜>")
    )


@pytest.mark.launch
def test_export_tells_how_near_the_logits_are(run_dir, tmp_path, capsys):
    (tmp_path / "half.tmp").mkdir()
    assert main(["export", str(run_dir), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "half.tmp"]
    said = capsys.readouterr().out
    assert "in bfloat16; on 64 tokens of text its logits are those of the source to " in said
    assert main(["export", str(run_dir), str(tmp_path / "half")]) == 2
    assert "is there already, and is not overwritten" in capsys.readouterr().err


@pytest.mark.launch
def test_import_of_export_is_the_same_bit_for_bit(run_dir, exported, tmp_path):
    assert main(["import", str(exported), str(tmp_path / "ours")]) == 0
    assert_same_weights(run_dir, tmp_path / "ours")
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "again"), "--max-shard-gb", "0.0001"]) == 0
    for file in exported.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.launch
def test_both_formats_regroup_alike_and_as_many_heads_as_before_are_the_same(run_dir, exported, tmp_path, capsys):
    for source, name in ((run_dir, "ours"), (exported, "hf")):
        assert main(["regroup", str(source), str(tmp_path / name), "--kv-heads", "2"]) == 0
        assert "4 heads on 4 to 4 heads on 2 by mean" in capsys.readouterr().out
        assert main(["regroup", str(source), str(tmp_path / f"{name} 4"), "--kv-heads", "4"]) == 0
        assert_same_weights(source, tmp_path / f"{name} 4")
    assert_same_weights(tmp_path / "ours", tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").exists() and (tmp_path / "ours" / "manifest.json").exists()
    assert main(["regroup", str(tmp_path / "ours"), str(tmp_path / "mqa"), "--kv-heads", "1"]) == 0
    assert open_source(tmp_path / "mqa").weights.config.n_kv_heads == 1
    assert main(["regroup", str(run_dir), str(tmp_path / "x"), "--kv-heads", "3"]) == 2
    assert "--kv-heads=3: does not divide the 4" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.launch
def test_heads_are_compared_by_weights_or_on_a_text_and_what_is_lost_is_said(run_dir, exported, tmp_path, capsys):
    by_weights, text = ["--kv-heads", "2", "--method", "svd"], tmp_path / "text.txt"
    for source, name in ((run_dir, "ours"), (exported, "hf")):
        assert main(["regroup", str(source), str(tmp_path / name), *by_weights]) == 0
        said = capsys.readouterr().out
        assert "4 heads on 4 to 4 heads on 2 by svd" in said and "heads were compared by weights; " in said
    assert_same_weights(tmp_path / "ours", tmp_path / "hf")
    text.write_text("def one(x):\n    return x + 1\n" * 20)
    assert main(["regroup", str(run_dir), str(tmp_path / "text"), *by_weights, "--calibrate", str(text)]) == 0
    assert re.search(r"by keys and values of \d+ tokens; \d of \d groups .* [\d.]+% of keys'", capsys.readouterr().out)
    name = "blocks.0.attention.qkv.v_proj.weight"
    ours, on_text = (open_source(tmp_path / one).weights.read(name) for one in ("ours", "text"))
    assert ours.shape == on_text.shape and not torch.allclose(ours, on_text)


@pytest.mark.launch
def test_a_text_to_compare_heads_on_that_cannot_be_is_refused(run_dir, tmp_path, capsys):
    (tmp_path / "no text").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").write_text("")
    for method, file, said in (
        (
            "mean",
            "empty",
            "--method=mean compares no heads; --method=similar or --method=aligned or",
        ),
        ("svd", "nowhere", "No such file or directory; a text file in UTF-8 would work"),
        ("svd", "no text", "is not UTF-8; a text file in UTF-8 would work"),
        ("svd", "empty", "has only 1 tokens; text of 16,384 would work"),
    ):
        command = ["regroup", str(run_dir), str(tmp_path / "x"), "--kv-heads", "2", "--method", method]
        assert main([*command, "--calibrate", str(tmp_path / file)]) == 2
        assert f"--calibrate={tmp_path / file}: {said}" in capsys.readouterr().err
    assert main(["regroup", str(run_dir), "x", "--kv-heads", "3", "--calibrate", "y", "--max-shard-gb", "0"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3  # all problems at once
    # before heads are compared, which takes long
    assert main(["regroup", str(run_dir), str(tmp_path), *command[3:], "--calibrate", str(tmp_path / "empty")]) == 2
    assert "is there already" in capsys.readouterr().err
    for method in Method:  # the command takes each that there is
        main(["regroup", str(tmp_path / "nowhere"), "x", "--kv-heads", "2", "--method", method.value])
        assert "no weights are there" in capsys.readouterr().err


@pytest.mark.launch
def test_uptraining_goes_on_with_the_recipe_for_a_share_of_its_tokens(run_dir, overrides, tmp_path):
    weights = tmp_path / "gqa"
    assert main(["regroup", str(run_dir), str(weights), "--kv-heads", "2"]) == 0
    up = [f"init_from={weights}", "uptrain.alpha=0.5", overrides[-1], "train.max_steps=null"]
    runs.finish(tmp_path / "one", 1, *up, "checkpoint.every_steps=5")
    runs.finish(tmp_path / "four", 4, *up, "parallel.tp=4")  # two key/value heads, each on two ranks
    # half of the 12 steps of 8 x 32 tokens
    one, four = runs.curve(tmp_path / "one"), runs.curve(tmp_path / "four")
    assert list(one) == list(range(7))
    for step, record in one.items():
        assert record == pytest.approx(four[step], rel=1e-4), step
    assert one.pop(0) == {"tokens": 0, "val_loss": pytest.approx(one[4]["val_loss"], abs=0.5)}
    config = json.loads((runs.saved(tmp_path / "one", 6) / "manifest.json").read_text())["config"]
    assert config["model"]["n_kv_heads"] == 2 and config["train"]["global_batch"] == 8
    # 12 steps of 8 sequences came before; the rate stays where theirs ended, after one step of warm-up
    assert config["train"]["skip_samples"] == 12 * 8
    assert [record["lr"] for record in one.values()] == pytest.approx([0.1 * 3e-3] * 6)
    # it began with the regrouped weights, not with new ones
    assert one[1]["loss"] < 5.8 < runs.curve(run_dir)[1]["loss"]
    # and goes on like any run
    (tmp_path / "one" / "summary.json").unlink()
    (runs.saved(tmp_path / "one", 6)).rename(tmp_path / "end")
    said = runs.finish(tmp_path / "one", 1, *up, "checkpoint.every_steps=5")
    assert "going on after step 5" in said
    assert runs.digests(runs.saved(tmp_path / "one", 6)) == runs.digests(tmp_path / "end")


@pytest.mark.launch
def test_a_run_begins_with_weights_from_elsewhere(exported, overrides, tmp_path):
    kept = [text for text in overrides if not text.startswith(("model.", "train.seq_len"))]
    begin = [f"init_from={exported}", "train.max_steps=2", "train.seq_len=32", "parallel.pp=2"]
    runs.finish(tmp_path / "run", 2, *kept, *begin)
    config = json.loads((runs.saved(tmp_path / "run", 2) / "manifest.json").read_text())["config"]
    assert config["model"]["d_model"] == 32 and config["data"]["tokenizer"] == str(exported / "tokenizer.json")
    assert runs.curve(tmp_path / "run")[1]["loss"] < 5.8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["uptrain.alpha=0.05"], "uptrain.alpha=0.05: there are no weights to train on"),
        (["init_from=HF", "uptrain.alpha=0.05"], "uptrain.alpha=0.05: init_from=HF does not say what recipe made it"),
        (["init_from=HF", "model.n_kv_heads=2"], "model.n_kv_heads=2: the weights of init_from=HF have 4"),
        (
            ["init_from=HF", "data.tokenizer=null", "data.tokenizer_vocab_size=300"],
            "data.tokenizer: not that of the weights; data.tokenizer=HF/token",
        ),
        (["init_from=nowhere"], "nowhere: no weights are there"),
        (["resume=OURS"], "holds weights alone; init_from="),
    ],
)
@pytest.mark.launch
def test_what_cannot_be_begun_with_is_said_before_any_process(arguments, said, exported, overrides, tmp_path, capsys):
    if "resume=OURS" in arguments:
        assert main(["import", str(exported), str(tmp_path / "step-00000000")]) == 0
    where = {"HF": str(exported), "OURS": str(tmp_path / "step-00000000")}
    for name, path in where.items():
        arguments = [text.replace(name, path) for text in arguments]
        said = said.replace(name, path)
    kept = [text for text in overrides if not text.startswith("model.") or "init_from" not in arguments[0]]
    assert main(["train", *kept, *arguments, f"hydra.run.dir={tmp_path}/run"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.launch
def test_a_tokenizer_larger_than_the_vocabulary_and_a_missing_one(exported, tmp_path, capsys):
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 400, "content": "<more>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["import", str(folder), str(tmp_path / "out")]) == 2
    assert "its tokens need 401 rows, and the model has vocab_size=400" in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    assert "tokenizer.json is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.tmp"))


@pytest.mark.launch
def test_a_large_model_passes_through_little_memory(tmp_path):
    (found,) = run_ranks("tests.launch.streaming", 1, tmp_path)
    assert found["bytes"] > 0.6e9
    assert found["grown"] < 0.25e9, found
