"""The shape of a model, the table of its tensors, and what both cost: FLOPs, cache, memory."""
