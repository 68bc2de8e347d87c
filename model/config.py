"""The shape of a model, what makes a shape impossible, and all arithmetic on it.

Nothing here needs PyTorch, so that a configuration can be judged before anything heavy is imported.
"""

from dataclasses import dataclass
from enum import Enum

from model.problems import either, nearest_divisors


class AttentionBackend(Enum):
    """Which attention kernel runs; see `model/kernels.py`."""

    auto = "auto"
    flash4 = "flash4"
    flash3 = "flash3"
    flash2 = "flash2"
    sdpa = "sdpa"
    reference = "reference"

    @property
    def needs_gpu(self) -> bool:
        """Whether it runs on GPUs alone."""
        return self.name.startswith("flash")


class Kernels(Enum):
    """What runs between the matrices and in the loss; see `model/fused.py`."""

    auto = "auto"
    plain = "plain"
    compiled = "compiled"
    liger = "liger"

    @property
    def needs_gpu(self) -> bool:
        """Whether it runs on GPUs alone."""
        return self is Kernels.liger


EXECUTION_KEYS = ("attention", "kernels")
"""Keys of a model's configuration that say how it runs and not what it computes."""


@dataclass
class ModelConfig:
    """A decoder-only transformer: pre-norm RMSNorm, SwiGLU, rotary positions, untied embeddings, no biases.

    The architecture is DeepSeek LLM's (arXiv 2401.02954, section 2.2, table 2). `n_kv_heads` picks the attention:
    as many as `n_heads` is multi-head, 1 is multi-query, anything between is grouped-query (arXiv 2305.13245).
    """

    n_layers: int = 8
    """Transformer blocks."""
    d_model: int = 256
    """Width of the residual stream."""
    n_heads: int = 8
    """Query heads."""
    n_kv_heads: int = 2
    """Key/value heads; each serves n_heads / n_kv_heads query heads."""
    d_ff: int = 768
    """Inner width of the SwiGLU feed-forward network; the paper rounds 8/3 d_model up to a multiple of 256."""
    vocab_size: int = 4096
    """Rows of the embedding and of the output head, padding included."""
    max_seq_len: int = 1024
    """Longest context in tokens."""
    head_dim: int | None = None
    """Width of a head; null makes it d_model / n_heads."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Added to the mean square inside RMSNorm."""
    init_std: float = 0.006
    """Standard deviation of every initial matrix (arXiv 2401.02954, section 2.3)."""
    attention: AttentionBackend = AttentionBackend.auto
    """auto, flash4, flash3, flash2, sdpa or reference: auto takes the fastest that is installed and runs."""
    kernels: Kernels = Kernels.auto
    """Norms, rotary positions, SwiGLU's product and the loss: auto, plain, compiled (torch.compile) or liger
    (Liger-Kernel). auto compiles on a GPU."""

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def attention_name(self) -> str:
        """MHA, MQA, or GQA with its number of groups (arXiv 2305.13245, section 2.2)."""
        return "MHA" if self.n_kv_heads == self.n_heads else "MQA" if self.n_kv_heads == 1 else f"GQA-{self.n_kv_heads}"

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads

    def problems(self) -> list[str]:
        """Every reason why this shape cannot be built, one sentence each with key, value and what would work."""
        found = [
            f"model.{key}={getattr(self, key)}: must be at least 1"
            for key in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "vocab_size", "max_seq_len")
            if getattr(self, key) < 1
        ]
        if self.head_dim is not None and self.head_dim < 1:
            found.append(f"model.head_dim={self.head_dim}: must be at least 1, or null for d_model / n_heads")
        for key in ("rope_theta", "norm_eps", "init_std"):
            if not getattr(self, key) > 0:
                found.append(f"model.{key}={getattr(self, key)}: must be above 0")
        if found:
            return found
        if self.head_dim is None and self.d_model % self.n_heads:
            works = nearest_divisors(self.d_model, self.n_heads)
            found.append(
                f"model.n_heads={self.n_heads}: does not divide model.d_model={self.d_model}; "
                f"{either('model.n_heads', works)} would, or give model.head_dim"
            )
        if (self.head_dim is not None or not self.d_model % self.n_heads) and self.d_head % 2:
            found.append(
                f"model.head_dim={self.d_head}: rotary positions turn pairs of values, so a head needs an even width; "
                f"model.head_dim={self.d_head + 1} would work"
            )
        if self.n_heads % self.n_kv_heads:
            works = nearest_divisors(self.n_heads, self.n_kv_heads)
            found.append(
                f"model.n_kv_heads={self.n_kv_heads}: does not divide model.n_heads={self.n_heads}, and every "
                f"key/value head serves equally many query heads; {either('model.n_kv_heads', works)} would"
            )
        return found

    # ---- parameters ----

    @property
    def attention_params(self) -> int:
        """Parameters of one block's attention: queries, keys, values, output."""
        return self.d_model * self.d_head * (2 * self.n_heads + 2 * self.n_kv_heads)

    @property
    def ffn_params(self) -> int:
        """Parameters of one block's SwiGLU: gate, up, down."""
        return 3 * self.d_model * self.d_ff

    @property
    def block_params(self) -> int:
        """Parameters of one block, its two norms included."""
        return self.attention_params + self.ffn_params + 2 * self.d_model

    @property
    def num_params(self) -> int:
        """Parameters of the whole model: 6,910,365,696 for the 7B, 67,425,001,472 for the 67B."""
        return sum(self.params_by_part().values())

    def params_by_part(self) -> dict[str, int]:
        """Parameters of each part; their sum is `num_params`."""
        return {
            "embedding": self.vocab_size * self.d_model,
            "attention": self.n_layers * self.attention_params,
            "feed-forward": self.n_layers * self.ffn_params,
            "norms": (2 * self.n_layers + 1) * self.d_model,
            "head": self.vocab_size * self.d_model,
        }

    # ---- compute ----

    def scaling_m(self, seq_len: int) -> int:
        """Non-embedding FLOPs per token of the scaling laws, M = 72 L d^2 + 12 L d s (arXiv 2401.02954, section 3.2).

        It assumes multi-head attention and an 8/3 feed-forward network, and counts causal attention whole.
        """
        return 72 * self.n_layers * self.d_model**2 + 12 * self.n_layers * self.d_model * seq_len

    def block_flops(self, seq_len: int) -> int:
        """FLOPs of one block's forward pass per token: two per weight, and causal attention, half of its square."""
        return 2 * (self.attention_params + self.ffn_params) + 2 * self.n_heads * self.d_head * seq_len

    @property
    def head_flops(self) -> int:
        """FLOPs of the output head's forward pass per token."""
        return 2 * self.d_model * self.vocab_size

    def layer_flops(self, seq_len: int) -> list[int]:
        """Forward FLOPs per token of [embedding, block 0, ..., head]; a lookup multiplies nothing."""
        return [0, *[self.block_flops(seq_len)] * self.n_layers, self.head_flops]

    def flops_per_token(self, seq_len: int) -> int:
        """True FLOPs per token of forward and backward: aware of grouped queries, the head counted, attention halved.

        The backward pass costs twice the forward one; recomputation is not work that the model needs.
        """
        return 3 * sum(self.layer_flops(seq_len))

    def flops_per_token_whole_attention(self, seq_len: int) -> int:
        """FLOPs per token of forward and backward with causal attention counted whole, though half of it is masked.

        It is the count of torchtitan and KempnerForge; Megatron-LM's is `flops_per_token`.
        """
        masked_half = 2 * self.n_heads * self.d_head * seq_len
        return self.flops_per_token(seq_len) + 3 * self.n_layers * masked_half

    def step_flops(self, tokens: int, squared_lengths: float) -> tuple[float, float]:
        """FLOPs of forward and backward over documents, each of which attends to itself alone.

        Args:
            tokens: of all documents.
            squared_lengths: the sum of the squares of their lengths.

        Returns:
            With causal attention halved, as `flops_per_token` counts it, and whole. For one document of L tokens they
            are L times those of a token in a sequence of L.
        """
        half = 6 * self.n_layers * self.n_heads * self.d_head * squared_lengths
        without = tokens * self.flops_per_token(0)
        return without + half, without + 2 * half

    # ---- inference ----

    def kv_cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values that each token of context keeps, over all layers (2 bytes a value: bf16)."""
        return 2 * self.n_layers * self.n_kv_heads * self.d_head * bytes_per_value
