"""`deepnarrow generate` on a real run, and the benchmark of decoding."""

import pytest

from launch.bench.decode import as_text, measure
from launch.cli import main
from model.generate import Sampling, complete
from model.weights import loaded_layers
from tests.train.checkpoint import runs
from train.data.tokenizer import eos_id, load_tokenizer
from train.weights import open_source


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
    made = complete(layers, source.weights.config, prompts, num_tokens, eos, sampling)
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
