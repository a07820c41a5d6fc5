"""Training: setup, the loop, one step, evaluation, anomalies and metrics."""
