"""The micro-batch: what a data loader hands over and a pipeline's first and last stages read.

B sequences, L tokens.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Token ids, what each position predicts, and the documents they come from.

    Attributes:
        tokens: int64 (B, L).
        labels: int64 (B, L), the token after each position; `model.loss.IGNORED` where nothing is predicted.
        documents: int32 (B, L), which document of its sequence a position belongs to; None where attention does not
            stop at the borders of documents.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    documents: torch.Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = True) -> "Batch":
        """The batch on a device; from pinned memory the copy overlaps with the host's work."""
        documents = self.documents
        return Batch(
            self.tokens.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            None if documents is None else documents.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "Batch":
        """The batch in page-locked host memory; a `torch.utils.data.DataLoader` with ``pin_memory=True`` calls it."""
        documents = self.documents
        return Batch(
            self.tokens.pin_memory(), self.labels.pin_memory(), None if documents is None else documents.pin_memory()
        )
