"""Generating text: a cache of the KV layers alone, and an engine that batches requests."""
