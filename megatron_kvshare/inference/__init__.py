"""Trained models in use (L6): loaded whole in one process, scored, evaluated."""
