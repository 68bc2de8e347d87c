"""Keys and values of earlier tokens, so that the next token costs the forward pass of one token.

B sequences, G key/value heads, M positions that are allocated, K head width.
"""

import torch


class KVCache:
    """The keys and values of one block: n_kv_heads of each for a token, not n_heads.

    The memory is allocated once, when the first keys come, which tell the number of heads, their width and their dtype:
    where a block is cut over tensor-parallel ranks, each caches its own heads.

    Args:
        lengths_B: int64, number of tokens of each sequence that are cached; shared by the caches of all blocks.
            Whoever runs the blocks counts it up after all of them have added a token.
        room: M, the most tokens of a sequence.
    """

    def __init__(self, lengths_B: torch.Tensor, room: int):
        self.lengths_B, self.size = lengths_B, room
        self._rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        self.empty = True
        """Whether nothing has been added."""
        self._longest = 0

    def add(self, k_BLGK: torch.Tensor, v_BLGK: torch.Tensor) -> None:
        """Add whole sequences to an empty cache, padded to the longest; afterwards one token of each at a time.

        The padding behind a shorter sequence is overwritten as it grows, and is never attended to.
        """
        if self.empty:
            B, _, G, K = k_BLGK.shape
            self._k_BGMK = k_BLGK.new_zeros(B, G, self.size, K)
            self._v_BGMK = torch.zeros_like(self._k_BGMK)
            self._longest = k_BLGK.shape[1]
            self._k_BGMK[:, :, : self._longest] = k_BLGK.transpose(1, 2)
            self._v_BGMK[:, :, : self._longest] = v_BLGK.transpose(1, 2)
            self.empty = False
        else:
            self._longest += 1
            self._k_BGMK[self._rows_B, :, self.lengths_B] = k_BLGK[:, 0]
            self._v_BGMK[self._rows_B, :, self.lengths_B] = v_BLGK[:, 0]

    def held(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values, views (B, G, m, K) up to the longest sequence; lengths (B,) with the token just added."""
        m = min(self._longest, self.size)
        return self._k_BGMK[:, :, :m], self._v_BGMK[:, :, :m], self.lengths_B + 1
