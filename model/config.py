"""The shape of a model, what makes a shape impossible, and all arithmetic on it.

Nothing here needs PyTorch, so that a configuration can be judged before anything heavy is imported.
"""

from collections import Counter
from collections.abc import Iterable
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
    window: int | None = None
    """Tokens that a query of a sliding block sees, itself included (sliding_window of Mistral, Gemma and others); the
    block's KV cache holds no more of them. null: all tokens before it, in every block."""
    window_pattern: str | None = None
    """Which blocks slide, a letter each, s (sliding) or f (full), and the same again until all blocks have one: sf is
    gpt-oss's, sssf OLMo 3's, sssssf Gemma 3's, as their layer_types say it. null: every block slides, as Mistral's."""
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

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each block, in order; None where it is full."""
        pattern = self.window_pattern or "s"
        return tuple(self.window if pattern[at % len(pattern)] == "s" else None for at in range(self.n_layers))

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
        return found + self._window_problems()

    def _window_problems(self) -> list[str]:
        found, window, pattern = [], self.window, self.window_pattern
        if window is not None and window < 1:
            found.append(f"model.window={window}: must be at least 1, the token itself, or null for all before it")
        elif window is not None and window >= self.max_seq_len:
            found.append(
                f"model.window={window}: hides nothing in a context of model.max_seq_len={self.max_seq_len}; a smaller "
                "one would, and model.window=null says that nothing is hidden"
            )
        if pattern is None:
            return found
        key = f"model.window_pattern={pattern}"
        if not pattern or set(pattern) - {"s", "f"}:
            found.append(f"{key}: is no word of s (sliding) and f (full), a letter for each block; sssf would work")
        elif len(pattern) > self.n_layers:
            found.append(
                f"{key}: has {len(pattern)} letters, and model.n_layers={self.n_layers}; {self.n_layers} letters or "
                "fewer would work"
            )
        elif "s" not in pattern:
            found.append(f"{key}: has no s, so that no block slides; model.window=null says that")
        elif window is None:
            found.append(
                f"{key}: says which blocks slide, and model.window=null gives them no window; a number would, and "
                "model.window_pattern=null needs none"
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

        It assumes multi-head attention and an 8/3 feed-forward network, and counts causal attention whole, without
        windows, since the laws were fitted so: a model with `window` has the M of the same model without.
        """
        return 72 * self.n_layers * self.d_model**2 + 12 * self.n_layers * self.d_model * seq_len

    def block_flops(self, seq_len: int, window: int | None = None) -> int:
        """FLOPs of one block's forward pass per token, the mean over a sequence's, rounded down.

        They are two per weight, and 4 H K for each pair of a query and a key that it sees (`seen_pairs`).
        """
        of_pairs = 2 * self.n_heads * self.d_head * int(2 * seen_pairs(seq_len, window)) // max(seq_len, 1)
        return 2 * (self.attention_params + self.ffn_params) + of_pairs

    @property
    def head_flops(self) -> int:
        """FLOPs of the output head's forward pass per token."""
        return 2 * self.d_model * self.vocab_size

    def layer_flops(self, seq_len: int) -> list[int]:
        """Forward FLOPs per token of [embedding, block 0, ..., head]; a lookup multiplies nothing."""
        return [0, *(self.block_flops(seq_len, window) for window in self.windows), self.head_flops]

    def flops_per_token(self, seq_len: int) -> int:
        """True FLOPs per token of forward and backward: aware of grouped queries, the head counted, attention halved.

        The backward pass costs twice the forward one; recomputation is not work that the model needs.
        """
        return 3 * sum(self.layer_flops(seq_len))

    def flops_per_token_whole_attention(self, seq_len: int) -> int:
        """FLOPs per token of forward and backward with causal attention counted whole, though half of it is masked.

        It is the count of torchtitan and KempnerForge; Megatron-LM's is `flops_per_token`. Where a window is shorter
        than the sequence, each token is counted with a whole window.
        """
        seen = sum(min(seq_len, window or seq_len) for window in self.windows)
        return self.flops_per_token(0) + 12 * self.n_heads * self.d_head * seen

    def attention_flops(self, lengths: Iterable[int]) -> tuple[float, float]:
        """FLOPs of attention, forward and backward, over documents, each of which attends to itself alone.

        Args:
            lengths: of the documents, in tokens.

        Returns:
            With causal attention halved and whole. Besides `flops_per_token(0)` of each token they are, for one
            document of L tokens, L times what `flops_per_token` and `flops_per_token_whole_attention` count at L.
        """
        halved, whole, windows = 0.0, 0.0, Counter(self.windows)
        for length, documents in Counter(lengths).items():
            for window, blocks in windows.items():
                halved += documents * blocks * seen_pairs(length, window)
                whole += documents * blocks * length * min(length, window or length)
        per_pair = 12 * self.n_heads * self.d_head
        return per_pair * halved, per_pair * whole

    # ---- inference ----

    def kv_cache_bytes(self, context: int, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values of a sequence of so many tokens, over all layers (2 bytes a value: bf16).

        A block keeps those of all tokens, or of its window's.
        """
        tokens = sum(min(context, window or context) for window in self.windows)
        return 2 * self.n_kv_heads * self.d_head * bytes_per_value * tokens

    def kv_cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of keys and values that a token of context adds, over all layers, until a window is full."""
        return self.kv_cache_bytes(1, bytes_per_value)


def seen_pairs(length: int, window: int | None = None) -> float:
    """The pairs of a query and a key that it sees in a sequence of so many tokens, by area.

    Without a window they are half of the square, L^2 / 2, as causal attention is usually counted. With one of W < L
    tokens they are what of that half is no further than W from the diagonal, W L - W^2 / 2. One by one there are
    L (L + 1) / 2 and W L - W (W - 1) / 2: counted by area, the diagonal is cut in half.
    """
    seen = min(length, window or length)
    return seen * length - seen * seen / 2
