"""Hugging Face's Llama format: what its files call our parameters, and which of its models are ours.

Llama has no sliding windows there. Mistral is Llama where every layer slides, and Ministral where some do and some are
full; a window is the same number there and here, the token itself counted.

A weight is the same matrix there and here, rows and columns in the same order: rotary positions turn (x[i], x[i + K/2])
in both, so that nothing is permuted.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.huggingface_files import FLOATS, INDEX, SINGLE, Place, beside, chosen_files, headers, read_object, shown, tie
from model.problems import either
from model.transformer import full_shapes
from model.weights import HEAD, StoredWeights, Weights, entries, few, shards, write_safetensors

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
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MISSING: Any = object()
_PLAIN: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu", "swish"),
    "pretraining_tp": (1, None),
}
"""What a config.json may say of what is not implemented otherwise; absent, it means the first."""
_WHOLE: dict[str, tuple[str, Any]] = {
    "n_layers": ("num_hidden_layers", _MISSING),
    "d_model": ("hidden_size", _MISSING),
    "n_heads": ("num_attention_heads", _MISSING),
    "d_ff": ("intermediate_size", _MISSING),
    "vocab_size": ("vocab_size", _MISSING),
    "n_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None),
    "max_seq_len": ("max_position_embeddings", 2048),
}
_MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", _MISTRAL),
    "ministral": ("MinistralForCausalLM", _MISTRAL),
}
"""The architecture of each model_type, and what it takes for keys that are absent where that is not Llama's."""
_SLIDING, _FULL = "sliding_attention", "full_attention"
_POSITIVE = {"norm_eps": ("rms_norm_eps", 1e-6), "init_std": ("initializer_range", 0.02)}
_NOT_KEPT = (
    *("dtype", "rope_parameters", "transformers_weights", "quantization_config", "auto_map"),
    *("sliding_window", "layer_types"),
)
"""Of a config.json: what is written under another key or anew, is of the source's files alone, or names code."""


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
    """config.json of this shape: a `LlamaForCausalLM`, or with windows a `MistralForCausalLM` or Ministral."""
    full = [window is None for window in config.windows]
    kind = "llama" if all(full) else "ministral" if any(full) else "mistral"
    slides: dict[str, Any] = {} if all(full) else {"sliding_window": config.window}
    if kind == "ministral":
        slides["layer_types"] = [_FULL if one else _SLIDING for one in full]
    return {
        "architectures": [_KINDS[kind][0]],
        "model_type": kind,
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
        **slides,
    }


def config_here(theirs: dict[str, Any], where: str) -> ModelConfig:
    """The shape that a config.json describes.

    A value that is absent is what `transformers` takes for it, and one that is null only where null means something
    there.

    Args:
        theirs: its content.
        where: its path, for what is said.

    Raises:
        ValueError: with a line for everything in it that this model cannot be.
    """
    problems = []
    kind = theirs.get("model_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        works = either("model_type", [*_KINDS])
        problems.append(f"model_type={shown(kind)}: not Llama's architecture; {works} would work")
    else:
        theirs = {**_KINDS[kind][1], **theirs}
    for key, plain in _PLAIN.items():
        if theirs.get(key, plain[0]) not in plain:
            problems.append(f"{key}={shown(theirs[key])}: is not implemented; {key}={plain[0]} would work")
    if theirs.get("quantization_config") is not None:
        problems.append("quantization_config: quantised weights are not read; the weights before that would work")
    if not isinstance(theirs.get("tie_word_embeddings", False), bool):
        problems.append(f"tie_word_embeddings={shown(theirs['tie_word_embeddings'])}: is neither true nor false")
    theta, rope_problems = _rotary(theirs)
    problems += rope_problems
    values: dict[str, Any] = {"rope_theta": theta}
    for ours, (key, default) in _WHOLE.items():
        values[ours] = theirs.get(key, default)
        if values[ours] is None and default is _MISSING:
            values[ours] = _MISSING
        if values[ours] is _MISSING:
            problems.append(f"{key} is missing")
        elif not _is_whole(values[ours]) and not (values[ours] is None and default is None):
            problems.append(f"{key}={shown(values[ours])}: must be a whole number from 1 to {2**24}")
    for ours, (key, default) in _POSITIVE.items():
        values[ours] = theirs.get(key, default)
        if not _is_positive(values[ours]):
            problems.append(f"{key}={shown(values[ours])}: must be a number above 0; {key}={default} is usual")
    problems += [] if problems else _slide(theirs, values)
    if problems:
        raise ValueError("\n".join(f"{where}: {problem}" for problem in problems))
    values["n_kv_heads"] = values["n_kv_heads"] or values["n_heads"]
    config = ModelConfig(**values)
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
    theirs = read_object(folder / "config.json")
    config = config_here(theirs, str(folder / "config.json"))
    chosen, weight_map = chosen_files(folder, theirs)
    found, lost, problems = headers(folder, chosen, weight_map)
    if theirs.get("tie_word_embeddings"):
        problems += tie(folder, found, _EMBEDDING, _HEAD)
    if problems and not found:
        raise ValueError("\n".join(problems))
    if config.n_layers > len(found) + len(lost):  # what each of them lacks would be a consequence, and many lines
        layers = f"num_hidden_layers={config.n_layers}"
        problems.append(f"{folder / 'config.json'}: {layers}: the files hold {len(found)} tensors altogether")
        raise ValueError("\n".join(problems))
    expected = {name_there(name): (name, shape) for name, shape in full_shapes(config).items()}
    tensors = {}
    missing, misshapen = [], []
    by_dtype: dict[str, list[Place]] = {}
    for key, (name, shape) in expected.items():
        if key not in found:
            if key not in lost:
                missing.append(f"{folder}: {key} is missing")
            continue
        at = found[key]
        if at.shape != list(shape):
            misshapen.append(f"{folder / at.file}: {key} has shape {at.shape}, and config.json makes it {list(shape)}")
        by_dtype.setdefault(at.dtype, []).append(at)
        piece = {"offset": [0] * len(shape), "shape": list(shape), "file": at.file, "key": at.key}
        tensors[name] = {"shape": list(shape), "pieces": [piece]}
    strange = [
        f"{folder / at.file}: {key} is no tensor of this architecture"
        for key, at in found.items()
        if key not in expected and not key.endswith("rotary_emb.inv_freq")  # a table that old versions stored
    ]
    problems += [
        f"{folder / those[0].file}: {_and_others(those)} stored as {dtype}; {', '.join(FLOATS)} would work"
        for dtype, those in by_dtype.items()
        if dtype not in FLOATS
    ]
    problems += few(missing) + few(misshapen) + few(strange)
    if problems:
        raise ValueError("\n".join(problems))
    notes = beside(folder, chosen, {at.file for at in found.values()})
    if doubles := by_dtype.get("F64"):
        notes.append(f"{folder / doubles[0].file}: {_and_others(doubles)} stored in float64, and taken as float32")
    if theirs.get("rope_theta", config.rope_theta) != config.rope_theta:
        said = f"rope_theta={shown(theirs['rope_theta'])}"
        notes.append(f"{folder / 'config.json'}: {said}: its rope_parameters say {config.rope_theta}, which is taken")
    if config.window is None and theirs.get("sliding_window") is not None:
        said = f"sliding_window={shown(theirs['sliding_window'])}"
        notes.append(f"{folder / 'config.json'}: {said}: hides nothing from any layer of {config.max_seq_len} tokens")
    return StoredWeights(config, folder, tensors, tuple(notes))


def write_huggingface(
    weights: Weights,
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
    bos_id: int,
    eos_id: int,
    *,
    tied: bool = False,
    described: Mapping[str, Any] | None = None,
) -> None:
    """Write a model so that `AutoModelForCausalLM.from_pretrained` and vLLM load it, one tensor in memory at a time.

    Args:
        weights: of any size.
        folder: exists; gets the shards, their index, config.json and generation_config.json.
        dtype: of the written weights.
        max_shard_bytes: of one file.
        bos_id, eos_id: the tokens that begin and end a document.
        tied: whether the head is the embedding, and is not written once more.
        described: the config.json that the weights came with, if they did: what it says beyond the shape stays, special
            tokens among it, and a generation_config.json is its source's to give.
    """
    tensors = [entry for entry in entries(weights, dtype, name_there) if not (tied and entry.key == name_there(HEAD))]
    files = shards(tensors, max_shard_bytes)
    index: dict[str, str] = {}
    for number, shard in enumerate(files, 1):
        name = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(folder / name, shard)
        index |= {entry.key: name for entry in shard}
    total = sum(entry.num_bytes for entry in tensors)
    if len(files) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    content = config_there(weights.config, dtype, bos_id, eos_id) | {"tie_word_embeddings": tied}
    if described is None:
        ids = {"bos_token_id": bos_id, "eos_token_id": eos_id}
        _write_json(folder / "generation_config.json", {**ids, "do_sample": False})
    else:
        kept = {key: value for key, value in described.items() if key not in _NOT_KEPT}
        shape = {key: value for key, value in content.items() if key not in ("bos_token_id", "eos_token_id")}
        content = kept | shape
    _write_json(folder / "config.json", content)


def _rotary(theirs: dict[str, Any]) -> tuple[float, list[str]]:
    """The base of the rotary frequencies, where `transformers` looks for it, and what is wrong with what is said."""
    said = {key: theirs[key] for key in ("rope_scaling", "rope_parameters") if theirs.get(key) is not None}
    if problems := [
        f"{key}={shown(value)}: is no JSON object; null would work"
        for key, value in said.items()
        if not isinstance(value, dict)
    ]:
        return 0.0, problems
    rope = said.get("rope_scaling") or said.get("rope_parameters") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        problems.append(f"rope_scaling of type {shown(scaling)}: is not implemented; a model without it would work")
    part = rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor"))
    if part is not None and part != 1:
        problems.append(f"partial_rotary_factor={shown(part)}: is not implemented; a model without it would work")
    theta = rope.get("rope_theta", theirs.get("rope_theta", 10000.0))
    if not _is_positive(theta):
        problems.append(f"rope_theta={shown(theta)}: must be a number above 0; rope_theta=10000.0 is usual")
    return float(theta) if _is_positive(theta) else 0.0, problems


def _slide(theirs: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """Add the window and its pattern to the values of a configuration; return what is wrong with them."""
    window, layers = theirs.get("sliding_window"), values["n_layers"]
    if theirs["model_type"] == "llama" or window is None:  # Llama's code there reads neither of the two keys
        return []
    if not _is_whole(window):
        return [f"sliding_window={shown(window)}: must be a whole number from 1, or null"]
    types = theirs.get("layer_types")  # a Mistral that has them is taken for a Ministral there
    types = [_SLIDING] * layers if types is None else types
    if not isinstance(types, list) or len(types) != layers or not all(one in (_SLIDING, _FULL) for one in types):
        return [f"layer_types={shown(types)}: is no list of {_SLIDING} and {_FULL} for each of {layers} layers"]
    letters = "".join("f" if one == _FULL else "s" for one in types)
    if "s" in letters and window < values["max_seq_len"]:
        period = next(n for n in range(1, layers + 1) if all(letters[at] == letters[at % n] for at in range(layers)))
        values["window"], values["window_pattern"] = window, None if "f" not in letters else letters[:period]
    return []


def _and_others(places: list[Place]) -> str:
    return f"{places[0].key} is" if len(places) == 1 else f"{places[0].key} and {len(places) - 1} others are"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 2**24


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e38


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
