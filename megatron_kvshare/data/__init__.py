"""From text to batches (L4): documents, tokenizers, token files, samples in one order."""
