"""From text to batches: documents, tokenizers, token files, samples in one order."""
