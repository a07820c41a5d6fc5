"""Training (L5): setup, the loop, one step, evaluation, anomalies and metrics."""
