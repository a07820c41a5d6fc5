"""What a resumable benchmark has measured so far, by the name of the run, in a JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """Everything measured; empty before the first run."""
    return json.loads(path.read_text()) if path.exists() else {}


def keep(path: Path, name: str, measured: dict[str, Any]) -> None:
    """Add a finished run."""
    everything = {**read(path), name: measured}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted(everything.items())), indent=1) + "\n")
