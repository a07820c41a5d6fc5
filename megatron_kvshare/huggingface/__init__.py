"""Hugging Face folders (L5): written, read and proven equal to the native model."""
