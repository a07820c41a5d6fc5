"""Native checkpoints: saved whole or not at all, checked against the run that loads them."""
