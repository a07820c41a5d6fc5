"""The scripts of tools/ that are commands: started from anywhere, with the command's flags and exit
codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.world import PATIENCE_SECONDS

ROOT = Path(__file__).parents[3]
COMMANDS = {
    "convert_from_hf": "convert from-hf",
    "convert_to_hf": "convert to-hf",
    "evaluate": "evaluate",
    "merge_datasets": "data merge",
    "preprocess_data": "preprocess",
    "train_tokenizer": "train-tokenizer",
}


def test_all_of_them_are_tried() -> None:
    scripts = [path for path in (ROOT / "tools").glob("*.py") if "as_script" in path.read_text()]
    assert {path.stem for path in scripts} == COMMANDS.keys()


@pytest.mark.parametrize("script", COMMANDS)
def test_each_is_its_command(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / f"{script}.py", "--no-such-flag"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 2
    assert f"kvshare {COMMANDS[script]} --help" in done.stderr, done.stderr
