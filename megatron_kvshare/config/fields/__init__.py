"""The settings: dataclasses whose fields become flags and YAML keys."""
