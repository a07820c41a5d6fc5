"""Cross-layer KV sharing as data: maps, patterns, pass plans and costs (L1, pure Python)."""
