"""Hugging Face's Llama format: what its files call our parameters, and which of its models are ours.

A weight is the same matrix there and here, rows and columns in the same order: rotary positions turn (x[i], x[i + K/2])
in both, so that nothing is permuted.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.config import ModelConfig
from model.transformer import full_shapes
from model.weights import StoredWeights, Weights, entries, shards, write_safetensors

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_NAMES = {
    r"embedding\.tokens": "model.embed_tokens",
    r"blocks\.(\d+)\.attention_norm": r"model.layers.\1.input_layernorm",
    r"blocks\.(\d+)\.attention\.qkv\.([qkv]_proj)": r"model.layers.\1.self_attn.\2",
    r"blocks\.(\d+)\.attention\.o_proj": r"model.layers.\1.self_attn.o_proj",
    r"blocks\.(\d+)\.ffn_norm": r"model.layers.\1.post_attention_layernorm",
    r"blocks\.(\d+)\.ffn\.gate_up\.((?:gate|up)_proj)": r"model.layers.\1.mlp.\2",
    r"blocks\.(\d+)\.ffn\.down_proj": r"model.layers.\1.mlp.down_proj",
    r"head\.norm": "model.norm",
    r"head\.proj": "lm_head",
}


def name_there(name: str) -> str:
    """What Hugging Face's Llama calls the parameter `name`.

    Raises:
        KeyError: it has none like it.
    """
    for pattern, theirs in _NAMES.items():
        if match := re.fullmatch(pattern + r"\.weight", name):
            return match.expand(theirs) + ".weight"
    raise KeyError(name)


def config_there(config: ModelConfig, dtype: torch.dtype, bos_id: int, eos_id: int) -> dict[str, Any]:
    """config.json of a `LlamaForCausalLM` of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "vocab_size": config.vocab_size,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def config_here(theirs: dict[str, Any], where: str) -> ModelConfig:
    """The shape that a config.json describes.

    Args:
        theirs: its content.
        where: its path, for what is said.

    Raises:
        ValueError: with a line for everything in it that this model cannot be.
    """
    problems = []
    kind = theirs.get("model_type")
    if kind != "llama":
        problems.append(f"{where}: model_type={kind}: not Llama's architecture; model_type=llama would work")
    for key, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu"), ("pretraining_tp", 1)):
        if theirs.get(key, plain) != plain:
            problems.append(f"{where}: {key}={theirs[key]}: is not implemented; {key}={plain} would work")
    rope = {**(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        problems.append(f"{where}: rope_scaling of type {scaling}: is not implemented; a model without it would work")
    needed = {
        "n_layers": "num_hidden_layers",
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "vocab_size": "vocab_size",
    }
    problems += [f"{where}: {key} is missing" for key in needed.values() if not isinstance(theirs.get(key), int)]
    if problems:
        raise ValueError("\n".join(problems))
    config = ModelConfig(
        **{ours: theirs[key] for ours, key in needed.items()},
        n_kv_heads=theirs.get("num_key_value_heads") or theirs["num_attention_heads"],
        head_dim=theirs.get("head_dim"),
        max_seq_len=theirs.get("max_position_embeddings", 2048),
        rope_theta=float(theirs.get("rope_theta") or rope.get("rope_theta", 10000.0)),
        norm_eps=theirs.get("rms_norm_eps", 1e-6),
        init_std=theirs.get("initializer_range", 0.02),
    )
    if config.head_dim is not None and config.head_dim * config.n_heads == config.d_model:
        config.head_dim = None
    if problems := config.problems():
        raise ValueError("\n".join(f"{where}: {problem}" for problem in problems))
    return config


def open_huggingface(folder: Path) -> StoredWeights:
    """The weights of a Llama-shaped model in Hugging Face's layout; only headers are read.

    A head that is tied to the embedding becomes a head of its own with the same numbers.

    Raises:
        ValueError: with a line for everything that is missing, truncated or not Llama-shaped, by file and tensor.
    """
    try:
        theirs = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    config = config_here(theirs, str(folder / "config.json"))
    found, problems = _headers(folder)
    expected = {name_there(name): (name, shape) for name, shape in full_shapes(config).items()}
    if theirs.get("tie_word_embeddings") and "lm_head.weight" not in found:
        found["lm_head.weight"] = found.get("model.embed_tokens.weight", ("", []))
    tensors = {}
    for key, (name, shape) in expected.items():
        if key not in found:
            problems.append(f"{folder}: {key} is missing")
            continue
        file, there = found[key]
        if list(there) != list(shape):
            problems.append(f"{folder / file}: {key} has shape {list(there)}, and config.json makes it {list(shape)}")
        stored = "model.embed_tokens.weight" if key == "lm_head.weight" and theirs.get("tie_word_embeddings") else key
        piece = {"offset": [0] * len(shape), "shape": list(shape), "file": file, "key": stored}
        tensors[name] = {"shape": list(shape), "pieces": [piece]}
    for key in found.keys() - expected.keys():
        if not key.endswith("rotary_emb.inv_freq"):  # a table that old versions stored
            problems.append(f"{folder / found[key][0]}: {key} is no tensor of this architecture")
    if problems:
        raise ValueError("\n".join(problems))
    return StoredWeights(config, folder, tensors)


def write_huggingface(
    weights: Weights, folder: Path, dtype: torch.dtype, max_shard_bytes: int, bos_id: int, eos_id: int
) -> None:
    """Write a model so that `AutoModelForCausalLM.from_pretrained` and vLLM load it, one tensor in memory at a time.

    Args:
        weights: of any size.
        folder: exists; gets the shards, their index, config.json and generation_config.json.
        dtype: of the written weights.
        max_shard_bytes: of one file.
        bos_id, eos_id: the tokens that begin and end a document.
    """
    tensors = entries(weights, dtype, name_there)
    files = shards(tensors, max_shard_bytes)
    index: dict[str, str] = {}
    for number, shard in enumerate(files, 1):
        name = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(folder / name, shard)
        index |= {entry.key: name for entry in shard}
    total = sum(entry.num_bytes for entry in tensors)
    if len(files) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    _write_json(folder / "config.json", config_there(weights.config, dtype, bos_id, eos_id))
    _write_json(folder / "generation_config.json", {"bos_token_id": bos_id, "eos_token_id": eos_id, "do_sample": False})


def _headers(folder: Path) -> tuple[dict[str, tuple[str, list[int]]], list[str]]:
    """Of every tensor its file and shape, and what is wrong with the files."""
    problems: list[str] = []
    wanted: dict[str, str] = {}
    if (folder / INDEX).exists():
        wanted = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        files = sorted(set(wanted.values()))
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            pickles = sorted(path.name for path in folder.glob("*.bin"))
            hint = f"; {pickles[0]} is a pickle, which can run code, and is not read" if pickles else ""
            problems.append(f"{folder}: no safetensors file is there{hint}")
    found: dict[str, tuple[str, list[int]]] = {}
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as file:
                found |= {key: (name, file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            problems.append(f"{folder / name}: {str(error) or 'cannot be read'}")
    problems += [
        f"{folder / name}: {key} is not in it, and {INDEX} says so"
        for key, name in wanted.items()
        if key not in found and (folder / name).exists() and not any(str(folder / name) in line for line in problems)
    ]
    return found, problems


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
