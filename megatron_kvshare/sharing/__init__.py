"""Cross-layer KV sharing as data: maps, patterns, recipes and plans of sweeps (no torch)."""
