"""Hugging Face folders: written, read and proven equal to the native model."""
