"""Native checkpoints (L4): saved whole or not at all, checked against the run that loads them."""
