"""`deepnarrow generate` on a real run, and the benchmark of decoding."""

import time

import pytest

from launch.bench.decode import as_text, measure
from launch.cli import main
from model.generate import Decoder, Sampling, complete
from model.weights import loaded_layers
from tests.ranks import nursery
from tests.train.checkpoint import runs
from train.data.tokenizer import eos_id, load_tokenizer
from train.pretrained import open_source


@pytest.fixture(scope="module")
def run_dir(overrides, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    runs.finish(folder, 2, *overrides, "parallel.pp=2", "train.max_steps=6")
    return folder


def expected(run_dir, texts, sampling, num_tokens):
    source = open_source(run_dir)
    tokenizer = load_tokenizer(source.tokenizer)
    eos = eos_id(tokenizer)
    layers = [layer for _, layer in loaded_layers(source.weights)]
    prompts = [[eos, *tokenizer.encode(text).ids] for text in texts]
    made = complete(Decoder(layers, prompts, 64), num_tokens, [eos], sampling)
    return [text + tokenizer.decode(row) for text, row in zip(texts, made, strict=True)]


@pytest.mark.launch
@pytest.mark.parametrize("options", [["--temperature", "0"], ["--top-k", "5", "--top-p", "0.9", "--seed", "7"]])
def test_one_prompt_streams_and_several_run_as_a_batch(options, run_dir, capsys):
    sampling = Sampling(temperature=0) if options[1] == "0" else Sampling(0.8, 5, 0.9, 7)
    assert main(["generate", str(run_dir), "--prompt", "def é", "--max-tokens", "30", *options]) == 0
    assert capsys.readouterr().out == expected(run_dir, ["def é"], sampling, 30)[0] + "\n"
    texts = ["def ", "import os\nimport "]
    given = [word for text in texts for word in ("--prompt", text)]
    assert main(["generate", str(run_dir), *given, "--max-tokens", "10", *options]) == 0
    said = capsys.readouterr().out
    whole = expected(run_dir, texts, sampling, 10)
    assert said == "".join(f"--- {text}\n{text_and_more}\n" for text, text_and_more in zip(texts, whole, strict=True))


@pytest.mark.launch
@pytest.mark.parametrize(("pp", "tp"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_started_by_a_launcher_the_ranks_of_a_layout_make_the_same_tokens(pp, tp, run_dir, tmp_path):
    texts = ["def ", "import os\nimport "]
    given = [word for text in texts for word in ("--prompt", text)]
    options = ["--max-tokens", "20", "--top-p", "0.9", "--seed", "3", "--pp", str(pp), "--tp", str(tp)]
    ranks = nursery().start("launch.cli", pp * tp, ["generate", str(run_dir), *given, *options], tmp_path)
    assert ranks.wait(120) == [0] * pp * tp, (tmp_path / "rank0.log").read_text()
    whole = expected(run_dir, texts, Sampling(0.8, None, 0.9, 3), 20)
    said = "".join(f"--- {text}\n{text_and_more}\n" for text, text_and_more in zip(texts, whole, strict=True))
    assert (tmp_path / "rank0.log").read_text() == said
    assert not any((tmp_path / f"rank{rank}.log").read_text() for rank in range(1, pp * tp))


@pytest.mark.launch
def test_without_a_launcher_the_ranks_of_a_layout_are_started(run_dir, capfd):
    options = ["--temperature", "0", "--max-tokens", "12", "--pp", "2"]
    assert main(["generate", str(run_dir), "--prompt", "def é", *options]) == 0
    assert capfd.readouterr().out == expected(run_dir, ["def é"], Sampling(temperature=0), 12)[0] + "\n"


@pytest.mark.launch
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pp", "9"], "--pp=9: more stages than the 4 layers of the model (model.n_layers=4); --pp=4 is the most"),
        (["--tp", "3"], "--tp=3: does not divide the query heads, model.n_heads=4; --tp=2 or --tp=4 would work"),
        (["--pp", "0"], "--pp=0: must be at least 1"),
    ],
)
def test_a_layout_that_the_model_does_not_allow_is_refused_before_a_process_starts(options, said, run_dir, capsys):
    assert main(["generate", str(run_dir), "--prompt", "a", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.launch
def test_too_few_processes_are_said_once(run_dir, tmp_path):
    options = ["--prompt", "a", "--pp", "2", "--tp", "2"]
    ranks = nursery().start("launch.cli", 2, ["generate", str(run_dir), *options], tmp_path)
    while None in ranks.codes:
        time.sleep(0.05)
    assert ranks.codes == [2, 2]
    said = "--pp=2 --tp=2: needs 4 processes, and 2 were started\n"
    assert [(tmp_path / f"rank{rank}.log").read_text() for rank in range(2)] == [said, ""]


@pytest.mark.launch
def test_generation_ends_where_the_context_does_and_a_longer_prompt_is_refused(run_dir, capsys):
    assert main(["generate", str(run_dir), "--prompt", "a", "--max-tokens", "1000", "--temperature", "0"]) == 0
    capsys.readouterr()
    assert main(["generate", str(run_dir), "--prompt", "b", "--prompt", "a = 1\n" * 40]) == 2
    assert "and the model's context of 64 leaves no room for another" in capsys.readouterr().err
    assert main(["generate", str(run_dir), "--prompt", "a", "--top-p", "2", "--max-tokens", "0"]) == 2
    said = capsys.readouterr().err
    assert "--top-p=2.0" in said and "--max-tokens=0" in said


def test_the_decode_benchmark_compares_the_same_tokens():
    shape = ["model.n_layers=2", "model.d_model=64", "model.n_heads=4", "model.d_ff=96", "model.vocab_size=512"]
    found = measure([*shape], batch=2, context=32, tokens=4, rounds=2)
    assert found["same_tokens"] and found["ratio"] > 0
    assert found["ratio"] == found["seconds_per_step"]["transformers"] / found["seconds_per_step"]["ours"]
    assert "times as fast" in as_text(found)
