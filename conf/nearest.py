"""What a word that is no key was meant to be: the names of other projects, and words that differ by a letter or two."""

import difflib
from collections.abc import Iterable, Sequence

ELSEWHERE = {
    "model.n_layers": "num_layers num_hidden_layers n_layer layers",
    "model.d_model": "hidden_size dim n_embd width",
    "model.d_ff": "intermediate_size ffn_hidden_size ffn_dim",
    "model.n_heads": "num_attention_heads num_heads n_head heads",
    "model.n_kv_heads": "num_key_value_heads num_kv_heads num_query_groups n_query_groups kv_heads",
    "model.max_seq_len": "max_position_embeddings max_sequence_length context_length",
    "model.rope_theta": "rotary_emb_base rotary_base rope_base theta",
    "model.norm_eps": "rms_norm_eps rms_norm_epsilon norm_epsilon",
    "model.init_std": "initializer_range init_method_std",
    "model.window": "sliding_window sliding_window_width window_size",
    "parallel.pp": "pipe_parallel_size pipeline_model_parallel_size pipeline_parallel_degree pipeline",
    "parallel.tp": "model_parallel_size tensor_model_parallel_size tensor_parallel_degree tensor_parallel",
    "parallel.dp": "data_parallel_shard_degree data_parallel_size data_parallel",
    "parallel.virtual_stages": "num_virtual_stages_per_pipeline_rank virtual_pipeline_model_parallel_size",
    "parallel.recompute": "activation_checkpoint activation_checkpointing recompute_granularity gradient_checkpointing",
    "train.global_batch": "global_batch_size train_batch_size",
    "train.micro_batch": "micro_batch_size batch_size train_micro_batch_size_per_gpu per_device_train_batch_size",
    "train.seq_len": "seq_length sequence_length block_size",
    "train.max_steps": "train_iters train_steps steps iterations num_steps",
    "train.total_tokens": "train_tokens max_tokens",
    "train.precision": "dtype bf16 fp16 mixed_precision",
    "optimizer.lr": "learning_rate peak_lr max_lr",
    "optimizer.clip": "gradient_clipping clip_grad grad_clip max_norm max_grad_norm",
    "optimizer.beta1": "adam_beta1 beta_1",
    "optimizer.beta2": "adam_beta2 beta_2",
    "optimizer.weight_decay": "wd",
    "schedule.warmup_steps": "warmup_iters lr_warmup_iters lr_warmup_steps num_warmup_steps warmup",
    "schedule.final": "min_lr min_lr_factor min_decay_lr",
    "checkpoint.every_steps": "save_interval checkpoint_interval save_steps interval save_every",
    "train.val_every": "eval_interval eval_steps val_interval val_check_interval",
    "train.log_every": "log_interval logging_steps",
    "data.tokenizer": "tokenizer_name_or_path tokenizer_model vocab_file tokenizer_path",
}
"""The names that GPT-NeoX, Megatron-LM, torchtitan, nanotron, transformers and others have for a key."""
_KEY_OF = {name: key for key, names in ELSEWHERE.items() for name in names.split()}
_MOST = 2
_NAME, _LEAF, _WHOLE = 0.5, 0.6, 0.8
"""How alike words are at least, by difflib's ratio: names of presets, last parts within one section, whole keys."""


def nearest_keys(word: str, known: Sequence[str]) -> list[str]:
    """Find at most two keys that a word may have been meant for, the likeliest first.

    Args:
        word: as it was given, with its section or without.
        known: every dotted key, sections included.
    """
    section, _, leaf = word.lower().replace("-", "_").lstrip("_").rpartition(".")
    found = [key for key in known if key.rpartition(".")[2] == leaf or key == _KEY_OF.get(leaf)]
    if not found:
        siblings = [key for key in known if "." in key and (not section or key.rpartition(".")[0] == section)]
        leaves = {key.rpartition(".")[2]: key for key in siblings}
        found = [leaves[name] for name in difflib.get_close_matches(leaf, leaves, _MOST, _LEAF)]
    return list(dict.fromkeys([*found, *difflib.get_close_matches(word, known, _MOST, _WHOLE)]))[:_MOST]


def nearest_names(word: str, known: Iterable[str]) -> list[str]:
    """Find at most two of the known names that a word is like, the likeliest first."""
    return difflib.get_close_matches(word, list(known), _MOST, _NAME)
