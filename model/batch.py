"""The micro-batch: what a data loader hands over and a pipeline's stages read.

B sequences, L tokens.
"""

from dataclasses import dataclass

import torch

from model.documents import Documents


@dataclass(frozen=True)
class Batch:
    """Token ids, what each position predicts, and the documents they come from.

    Attributes:
        tokens: int64 (B, L).
        labels: int64 (B, L), the token after each position; `model.loss.IGNORED` where nothing is predicted. Where
            single tokens are scored, int64 (2, N): N positions, counted over all sequences, and a token after each.
        documents: the documents at whose borders attention and positions stop; None where each sequence is one.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    documents: Documents | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of the documents in tokens; each sequence is one where no documents are given."""
        return self.documents.lengths if self.documents else (self.tokens.shape[1],) * self.tokens.shape[0]

    def to(self, device: torch.device, non_blocking: bool = True) -> "Batch":
        """The batch on a device; from pinned memory the copy overlaps with the host's work."""
        return Batch(
            self.tokens.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.documents and self.documents.to(device, non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """The batch in page-locked host memory; a `torch.utils.data.DataLoader` with ``pin_memory=True`` calls it."""
        return Batch(self.tokens.pin_memory(), self.labels.pin_memory(), self.documents and self.documents.pin_memory())
