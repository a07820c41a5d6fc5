"""Training (L5): setup, the loop, one step, evaluation, guards and metrics."""
