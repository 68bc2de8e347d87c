"""The same model by us and by other libraries: each has our shape, and loads our weights by its own converter."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launch.bench.common import SEED, RandomWeights
from model.config import ModelConfig
from model.huggingface import name_there, write_huggingface
from model.init import initialise
from model.loss import cross_entropy
from model.transformer import Transformer
from model.weights import entries

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A function from tokens and labels, int64 (B, L), to the mean loss."""


@dataclass(frozen=True)
class Contender:
    """A model that is compared.

    Attributes:
        model: the model, on the device of the benchmark and in its dtype.
        loss: the forward pass, from tokens and labels to the mean loss.
        description: the classes and functions that are compared.
    """

    model: nn.Module
    loss: Loss
    description: str


def ours(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Contender:
    """Build our own model."""
    model = Transformer(config)
    initialise(model, "", SEED, config.init_std)
    model.to(device, dtype)
    return Contender(
        model, lambda tokens, labels: cross_entropy(model(tokens), labels).mean, "Transformer, cross_entropy"
    )


def _transformers(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Contender:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as progress

    progress.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        write_huggingface(RandomWeights(config, config.init_std), Path(folder), torch.float32, 10**12, 0, 0)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device).train()

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # `labels` alone would be shifted by one more; a cache is for inference.
        return model(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False).loss

    attention = model.config._attn_implementation
    return Contender(model, loss, f"{type(model).__name__} with {attention} attention, its own loss")


def _without_window(config: ModelConfig) -> None:
    if config.window is not None:
        raise ValueError(f"is built here without model.window={config.window}; model.window=null would compare it")


def _litgpt(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Contender:
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy

    _without_window(config)
    theirs = Config(
        name="deepnarrow",
        block_size=config.max_seq_len,
        n_layer=config.n_layers,
        n_embd=config.d_model,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        n_head=config.n_heads,
        n_query_groups=config.n_kv_heads,
        head_size=config.d_head,
        intermediate_size=config.d_ff,
        norm_class_name="RMSNorm",
        norm_eps=config.norm_eps,
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        rope_base=int(config.rope_theta),
        parallel_residual=False,
        bias=False,
    )
    model = GPT(theirs)
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(theirs, {}, weights, _hugging_face(config))
    model.load_state_dict(weights)
    model.to(device, dtype)
    return Contender(
        model,
        lambda tokens, labels: chunked_cross_entropy(model(tokens), labels),
        "GPT, chunked_cross_entropy in chunks of 128",
    )


def _torchtitan(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Contender:
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
    from torchtitan.models.llama3 import Llama3Model
    from torchtitan.models.llama3.model import Llama3TransformerBlock
    from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter

    _without_window(config)
    width, none = config.d_model, {"weight": nn.init.zeros_}  # weights are loaded

    def norm() -> Any:
        return RMSNorm.Config(normalized_shape=width, eps=config.norm_eps)

    def block() -> Any:
        attention = make_gqa_config(
            dim=width,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.d_head,
            wqkv_param_init=none,
            wo_param_init=none,
            # Its default attention is compiled, masks by document, and has no backward pass on the CPU.
            inner_attention=ScaledDotProductAttention.Config(),
            fuse_qkv=True,
            rope=ComplexRoPE.Config(dim=config.d_head, max_seq_len=config.max_seq_len, theta=config.rope_theta),
        )
        ffn = make_ffn_config(dim=width, hidden_dim=config.d_ff, w1_param_init=none, w2w3_param_init=none)
        return Llama3TransformerBlock.Config(
            attention=attention, feed_forward=ffn, attention_norm=norm(), ffn_norm=norm()
        )

    theirs = Llama3Model.Config(
        dim=width,
        vocab_size=config.vocab_size,
        tok_embeddings=Embedding.Config(num_embeddings=config.vocab_size, embedding_dim=width),
        norm=norm(),
        lm_head=Linear.Config(in_features=width, out_features=config.vocab_size),
        layers=[block() for _ in range(config.n_layers)],
    )
    model = theirs.build()
    # Its adapter permutes the rows of queries and keys: it rotates neighbouring values, and we those K/2 apart.
    model.load_state_dict(Llama3StateDictAdapter(theirs, None).from_hf(_hugging_face(config)))
    model.to(device)
    for parameter in model.parameters():  # `model.to(dtype)` would drop the imaginary part of its complex tables
        parameter.data = parameter.data.to(dtype)
    return Contender(
        model,
        lambda tokens, labels: cross_entropy_loss(model(tokens), labels) / labels.numel(),
        "Llama3Model with fused q, k, v and ScaledDotProductAttention, cross_entropy_loss",
    )


PEERS: dict[str, Callable[[ModelConfig, torch.device, torch.dtype], Contender]] = {
    "transformers": _transformers,
    "litgpt": _litgpt,
    "torchtitan": _torchtitan,
}
"""The functions that build other libraries' models, by distribution name; they may raise any exception."""


def _hugging_face(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return our weights by their names in Hugging Face's format, fp32."""
    weights = RandomWeights(config, config.init_std)
    return {entry.key: entry.value() for entry in entries(weights, torch.float32, name_there)}
