"""A shuffled order that takes no memory: which sequence is the n-th sample of a run."""

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ROUNDS = 8


class SampleOrder:
    """`order[global_index]`: the sequence that is sample `global_index` of a run.

    A pure function of (num_sequences, seed, global_index), so that a run resumes from one integer and every rank
    agrees with every other without talking. Epoch e, the samples from e * num_sequences on, is a permutation of all
    sequences of its own. A permutation array would take 4 GB for the 5e8 sequences of two trillion tokens; instead
    a block cipher over the smallest even number of bits that can hold the indices is walked until it lands inside
    (fewer than four steps on average): a balanced Feistel network of 8 rounds, whose round function is the
    64-bit finalizer of MurmurHash3 over (half xor round key), cut to the half's width. The round keys are the
    BLAKE2b hash of `seed:epoch`, read as little-endian 64-bit words. Integer arithmetic modulo 2**64 only, hence the
    same on every machine.

    Args:
        num_sequences: n, from 1 up to 2**62.
        seed: any integer.

    Raises:
        ValueError: n is out of range.
    """

    def __init__(self, num_sequences: int, seed: int):
        if not 1 <= num_sequences <= 1 << 62:
            raise ValueError(f"num_sequences={num_sequences}: an order needs from 1 to 2**62 sequences")
        self.num_sequences = num_sequences
        self.seed = seed
        # At least one bit to each half, or there is nothing to swap.
        self._half = np.uint64(max(1, ((num_sequences - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)

    def __getitem__(self, global_index: int) -> int:
        """Look up the sequence of one sample; `take` is faster for many."""
        return int(self.take([global_index])[0])

    def take(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Look up the sequences of many samples at once.

        Args:
            indices: global sample indices, integers of any shape, from 0 up to 2**63 - 1.

        Returns:
            Sequence indices below `num_sequences`, int64, of the same shape.

        Raises:
            ValueError: an index is negative.
        """
        wanted = counted(indices)
        epochs, places = np.divmod(wanted, np.int64(self.num_sequences))
        result = np.empty_like(wanted)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = self._permute(places[chosen].astype(np.uint64), self._keys(int(epoch)))
        return result

    def _keys(self, epoch: int) -> NDArray[np.uint64]:
        digest = hashlib.blake2b(f"{self.seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        return np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def _permute(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        values = self._encipher(values, keys)
        # Cycle walking: enciphering again what fell outside keeps it one-to-one, and always comes back inside.
        while (outside := values >= np.uint64(self.num_sequences)).any():
            values[outside] = self._encipher(values[outside], keys)
        return values.astype(np.int64)

    def _encipher(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


def counted(indices: ArrayLike) -> NDArray[np.int64]:
    """Take numbers of samples as int64, of any shape.

    Raises:
        ValueError: one is negative.
    """
    wanted = np.asarray(indices, dtype=np.int64)
    if wanted.size and wanted.min() < 0:
        raise ValueError(f"sample {wanted.min()}: samples are counted from 0")
    return wanted


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply MurmurHash3's 64-bit finalizer; every bit of the result depends on every bit of `x`, shape (n,)."""
    x = x ^ (x >> np.uint64(33))
    x = x * np.uint64(0xFF51AFD7ED558CCD)
    x = x ^ (x >> np.uint64(33))
    x = x * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))
