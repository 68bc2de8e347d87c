"""Keys and values of earlier tokens, so that the next token costs the forward pass of one token.

B sequences, L tokens, G key/value heads, M positions that are allocated, K head width.
"""

import torch

_STEP = 256
"""Places by which what a GPU looks at grows; those that hold nothing yet are masked."""


class KVCache:
    """The keys and values of one block: n_kv_heads of each for a token, not n_heads.

    The memory is allocated once, when the first keys come, which tell the number of heads, their width and their dtype:
    where a block is cut over tensor-parallel ranks, each caches its own heads.

    Where the block has a window, only that many of a sequence's last tokens are kept: the token at position p is in
    place p mod M, where it overwrites the one that has left the window. Attention is a sum over places in any order,
    and keys have been rotated by their positions.

    Args:
        lengths_B: int64, number of tokens of each sequence that are in the past; shared by the caches of all blocks.
            Whoever runs the blocks counts it up after all of them have added a token.
        room: the most tokens of a sequence, which a GPU rounds up to a multiple of 256.
        window: the block's; M is the smaller of the two.
    """

    def __init__(self, lengths_B: torch.Tensor, room: int, window: int | None = None):
        self._step = _STEP if lengths_B.is_cuda else 1
        self.lengths_B, self.room = lengths_B, room
        self.size = min(self._in_steps(room), window or self._in_steps(room))
        self._rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        self.empty = True
        """Whether nothing has been added."""
        self.longest = 0
        """Tokens of the longest sequence."""

    def add(self, k_BLGK: torch.Tensor, v_BLGK: torch.Tensor) -> None:
        """Add whole sequences to an empty cache, padded to the longest; afterwards one token of each at a time.

        Places that a shorter sequence has not reached yet hold what is written over as it grows, and is never attended
        to.
        """
        if self.empty:
            B, _, G, K = k_BLGK.shape
            self._k_BGMK = k_BLGK.new_zeros(B, G, self.size, K)
            self._v_BGMK = torch.zeros_like(self._k_BGMK)
            self.longest = k_BLGK.shape[1]
            if self.longest > self.size:
                k_BLGK, v_BLGK = self._last(k_BLGK), self._last(v_BLGK)
            filled = k_BLGK.shape[1]
            self._k_BGMK[:, :, :filled] = k_BLGK.transpose(1, 2)
            self._v_BGMK[:, :, :filled] = v_BLGK.transpose(1, 2)
            self.empty = False
        else:
            self.longest += 1
            place_B = self.lengths_B % self.size
            self._k_BGMK[self._rows_B, :, place_B] = k_BLGK[:, 0]
            self._v_BGMK[self._rows_B, :, place_B] = v_BLGK[:, 0]

    def held(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values, views (B, G, m, K) up to the longest sequence, and how many of the m are there, int64 (B,).

        The token just added is among them.
        """
        m = self.in_view()
        return self._k_BGMK[:, :, :m], self._v_BGMK[:, :, :m], (self.lengths_B + 1).clamp(max=self.size)

    def in_view(self, more: int = 0) -> int:
        """Count the places that attention looks at once so many tokens have been added to each sequence, m.

        On a GPU it grows in steps, so that the shapes of decoding change seldom (`model.step_graph`).
        """
        return min(self._in_steps(self.longest + more), self.size)

    def _in_steps(self, places: int) -> int:
        return -(-places // self._step) * self._step

    def _last(self, x_BLGK: torch.Tensor) -> torch.Tensor:
        """The last M tokens of each sequence at their places, (B, M, G, K)."""
        places_M = torch.arange(self.size, device=x_BLGK.device)
        # The last position of a sequence that is at a place: as many rounds of M behind it as the sequence has tokens.
        rounds_BM = (self.lengths_B.unsqueeze(1) - 1 - places_M).div(self.size, rounding_mode="floor")
        positions_BM = (places_M + self.size * rounds_BM).clamp(min=0)
        return x_BLGK[self._rows_B.unsqueeze(1), positions_BM]
