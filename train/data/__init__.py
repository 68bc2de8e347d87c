"""From a corpus to micro-batches: documents, tokens, sequences read from disk, sample order."""
