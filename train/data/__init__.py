"""From a corpus to micro-batches: documents, tokens, memory-mapped sequences, sample order."""
