"""Hugging Face's Llama and ours: the same numbers under other names, and nothing taken in that is something else."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model.huggingface import config_here, config_there, name_there, open_huggingface, write_huggingface
from model.init import initial_value
from model.transformer import Transformer, full_shapes
from model.weights import loaded_layers, streamed_logits
from tests.shapes import small

SHAPES = {
    "MHA": small(4),
    "GQA": small(2),
    "MQA": small(1),
    "12 heads on 3": small(3, n_heads=12, d_model=96),
    "wide heads": small(2, head_dim=24),
    "windows": small(2, window=9),
    "windows in some layers": small(2, n_layers=4, window=9, window_pattern="ssf", rope_theta=5e5),
}


class Drawn:
    """A model at its initial weights."""

    def __init__(self, config, seed=1):
        self.config, self.seed = config, seed

    def read(self, name):
        shape = full_shapes(self.config)[name]
        value = initial_value(name, shape, self.seed, 0.1)
        return value if len(shape) > 1 else value + initial_value(name, torch.Size((1, *shape)), self.seed, 0.1)[0]


def written(weights, folder, dtype=torch.float32, max_shard_bytes=60_000):
    folder.mkdir(exist_ok=True)
    write_huggingface(weights, folder, dtype, max_shard_bytes, bos_id=1, eos_id=1)
    return folder


def tokens(config):
    return torch.randint(config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_loads_what_is_written_and_computes_and_generates_the_same(shape, tmp_path):
    weights = Drawn(SHAPES[shape])
    theirs = AutoModelForCausalLM.from_pretrained(written(weights, tmp_path / "out"), dtype=torch.float32)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    theirs.set_attn_implementation("eager")
    ours = Transformer(weights.config)
    ours.load_state_dict({name: weights.read(name) for name in full_shapes(weights.config)})
    tokens_BL = tokens(weights.config)
    with torch.no_grad():
        logits = ours(tokens_BL)
        torch.testing.assert_close(theirs(tokens_BL).logits, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(streamed_logits(weights, tokens_BL), logits, rtol=0, atol=0)
        generated = theirs.generate(tokens_BL[:, :10], max_new_tokens=12, do_sample=False, eos_token_id=-1)
        greedy = tokens_BL[:, :10]
        for _ in range(12):
            greedy = torch.cat((greedy, ours(greedy)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated, greedy)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_is_read_back_bit_for_bit(shape, tmp_path):
    weights = Drawn(SHAPES[shape])
    read = open_huggingface(written(weights, tmp_path / "out"))
    assert read.config == weights.config
    for name in full_shapes(weights.config):
        assert torch.equal(read.read(name), weights.read(name)), name


def test_one_shard_has_no_index_and_bf16_is_bf16(tmp_path):
    weights = Drawn(small())
    folder = written(weights, tmp_path / "out", torch.bfloat16, max_shard_bytes=10**9)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert all(
        torch.equal(tensor, weights.read(name).bfloat16())
        for name, tensor in ((n, load_file(folder / "model.safetensors")[name_there(n)]) for n in full_shapes(small()))
    )


def test_layers_are_made_one_at_a_time():
    weights, read = Drawn(small()), []
    reader = weights.read
    weights.read = lambda name: read.append(name) or reader(name)
    layers = loaded_layers(weights)
    assert next(layers)[0] == "embedding" and read == ["embedding.tokens.weight"]
    assert next(layers)[0] == "blocks.0" and len(read) == 1 + 9


def test_a_tied_head_is_the_embedding(tmp_path):
    folder = written(Drawn(small()), tmp_path / "out", max_shard_bytes=10**9)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    edit(folder, tie_word_embeddings=True)
    read = open_huggingface(folder)
    assert torch.equal(read.read("head.proj.weight"), read.read("embedding.tokens.weight"))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens(small())).logits, streamed_logits(read, tokens(small())))


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(model_type="gpt2"), "model_type=gpt2: not Llama's architecture"),
        (dict(attention_bias=True), "attention_bias=True: is not implemented"),
        (dict(mlp_bias=True), "mlp_bias=True: is not implemented"),
        (dict(hidden_act="gelu"), "hidden_act=gelu: is not implemented"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rope_scaling of type llama3: is not implemented"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling of type linear"),
        (dict(rope_scaling=None, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "type yarn"),
        (dict(hidden_size=None), "hidden_size is missing"),
        (dict(num_key_value_heads=3), "model.n_kv_heads=3: does not divide"),
        (dict(intermediate_size=161), "has shape [160, 64], and config.json makes it [161, 64]"),
        (dict(num_hidden_layers=3), "model.layers.2.self_attn.q_proj.weight is missing"),
        (dict(num_hidden_layers=1), "model.layers.1.mlp.up_proj.weight is no tensor of this architecture"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, said, tmp_path):
    folder = written(Drawn(small()), tmp_path / "out")
    edit(folder, **changes)
    with pytest.raises(ValueError) as error:
        open_huggingface(folder)
    assert said in str(error.value)


KINDS = {"windows": "mistral", "windows in some layers": "ministral", "GQA": "llama"}


@pytest.mark.parametrize("shape", KINDS)
def test_a_window_decides_the_architecture_and_comes_back_as_it_was(shape):
    theirs = config_there(SHAPES[shape], torch.float32, 0, 0)
    assert theirs["model_type"] == KINDS[shape] and hasattr(transformers, theirs["architectures"][0])
    assert ("sliding_window" in theirs) == (shape != "GQA")
    assert config_here(theirs, "") == SHAPES[shape]


def test_windows_are_read_as_transformers_reads_them():
    theirs = config_there(small(2, n_layers=4, window=9), torch.float32, 0, 0)
    sliding, full = "sliding_attention", "full_attention"

    def read(**changes):
        read = config_here({key: value for key, value in {**theirs, **changes}.items() if value is not ...}, "")
        return read.window, read.window_pattern

    assert read(layer_types=[full, full, sliding, sliding]) == (9, "ffss")
    assert read(layer_types=[sliding, full] * 2) == (9, "sf") and read(layer_types=[sliding] * 4) == (9, None)
    assert read(sliding_window=None) == read(sliding_window=64) == read(layer_types=[full] * 4) == (None, None)
    assert read(model_type="llama") == (None, None)  # whose code has no windows
    # What an absent key means: a window of 4,096 tokens, a context of 131,072, and 8 key/value heads.
    absent = dict(sliding_window=..., max_position_embeddings=..., num_key_value_heads=...)
    assert read(**absent, num_attention_heads=8) == (4096, None)
    mistral = transformers.MistralConfig()
    assert (mistral.sliding_window, mistral.max_position_embeddings, mistral.num_key_value_heads) == (4096, 131072, 8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(sliding_window=0), "sliding_window=0: must be a whole number"),
        (dict(layer_types=["sliding_attention"]), "layer_types=['sliding_attention']: is no list of sliding_attention"),
        (dict(layer_types=["chunked_attention"] * 2), "layer_types=['chunked_attention', 'chunked_attention']: is no"),
        (dict(model_type="qwen2"), "model_type=llama or model_type=mistral or model_type=ministral would work"),
        (dict(model_type=["mistral"]), "model_type=['mistral']: not Llama's architecture"),
    ],
)
def test_windows_that_are_none_are_refused_by_name(changes, said):
    theirs = config_there(small(2, window=9), torch.float32, 0, 0) | changes
    with pytest.raises(ValueError) as error:
        config_here(theirs, "config.json")
    assert said in str(error.value)


def test_a_window_that_hides_nothing_is_said(tmp_path):
    folder = written(Drawn(small(2, window=9)), tmp_path / "out")
    edit(folder, sliding_window=64)
    read = open_huggingface(folder)
    assert read.config.window is None
    assert read.notes == (f"{folder / 'config.json'}: sliding_window=64: hides nothing from any layer of 64 tokens",)


def test_every_problem_of_a_configuration_is_said_at_once():
    theirs = config_there(small(), torch.float32, 0, 0) | {"attention_bias": True, "hidden_act": "relu"}
    with pytest.raises(ValueError) as error:
        config_here(theirs, "config.json")
    assert len(str(error.value).splitlines()) == 2


def test_rope_theta_is_found_where_either_version_of_transformers_writes_it():
    theirs = config_there(replace(small(), rope_theta=5e5), torch.float32, 0, 0)
    assert config_here(theirs, "").rope_theta == 5e5
    del theirs["rope_theta"]
    theirs["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert config_here(theirs, "").rope_theta == 5e5


def test_missing_and_truncated_shards_are_named(tmp_path):
    folder = written(Drawn(small()), tmp_path / "out")
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    first.write_bytes(first.read_bytes()[:-10])
    second.unlink()
    with pytest.raises(ValueError) as error:
        open_huggingface(folder)
    assert first.name in str(error.value) and second.name in str(error.value)


def test_a_bias_and_a_pickle_are_named(tmp_path):
    folder = written(Drawn(small()), tmp_path / "out", max_shard_bytes=10**9)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"q_proj\.bias is no tensor of this architecture"):
        open_huggingface(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle, which can run code, and is not read"):
        open_huggingface(folder)
