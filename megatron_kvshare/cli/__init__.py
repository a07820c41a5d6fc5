"""Thin commands behind ``kvshare``."""
