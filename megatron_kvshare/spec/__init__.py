"""What a model is, and what a configuration comes to: derived once, passed along (no torch)."""
