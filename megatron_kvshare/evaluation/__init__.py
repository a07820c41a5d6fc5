"""Trained models in use: loaded whole in one process, scored, evaluated."""
