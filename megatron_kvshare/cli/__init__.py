"""Thin commands behind ``kvshare`` (L6)."""
