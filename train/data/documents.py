"""From rows of tokens to a micro-batch: labels, and the borders of documents.

In the token files an end token follows every document. Read as an input, it is the first token of the next document, at
position 0: so the last token of a document predicts the end, the end token predicts the first token of the document
after it and sees nothing before, and no position is without a label. A document then begins in training as a prompt
does in ``deepnarrow generate``. A row that begins in the middle of a document begins at position 0 as well, and what
came before it is not seen.

Where borders are known from elsewhere, such as an index beside token files without end tokens, they are given. The last
token of a document then predicts the end token if there is one, and else nothing: it is the one label that is lost.

B sequences, L tokens.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from model.batch import Batch
from model.documents import documents_of
from model.loss import IGNORED
from train.data.packing import PADDING


def batch_of(
    rows: NDArray[np.int64],
    *,
    eos_id: int | None,
    document_mask: bool,
    starts: NDArray[np.bool_] | None = None,
) -> Batch:
    """Make a micro-batch of rows of tokens.

    Args:
        rows: int64 (B, L + 1); inputs are [:, :-1], labels [:, 1:]. `PADDING` stands where a row is padded, at its end.
        eos_id: the token after each document; None where there is none.
        document_mask: whether attention and positions stop at the borders of documents.
        starts: bool (B, L + 1), whether a document, or the rest of one, begins at a token without an end token before
            it; None where that is nowhere so.

    Returns:
        The micro-batch (B, L) on the CPU. Padding is a document of its own whose labels are ignored.
    """
    tokens, labels = rows[:, :-1], rows[:, 1:]
    padding = tokens == PADDING
    begins = np.zeros_like(padding) if eos_id is None else tokens == eos_id
    begins[:, 1:] |= padding[:, 1:] & ~padding[:, :-1]
    if starts is not None:
        begins |= starts[:, :-1]
        labels = np.where(starts[:, 1:], PADDING if eos_id is None else eos_id, labels)
    return Batch(
        torch.from_numpy(np.where(padding, eos_id or 0, tokens)),
        torch.from_numpy(np.where(labels == PADDING, IGNORED, labels)),
        documents_of(torch.from_numpy(begins)) if document_mask else None,
    )
