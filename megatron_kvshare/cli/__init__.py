"""Thin commands behind ``kvshare`` (L7)."""
