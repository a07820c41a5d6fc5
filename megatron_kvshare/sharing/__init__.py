"""Cross-layer KV sharing as data: maps, patterns, sweep plans and costs (L1, pure Python)."""
