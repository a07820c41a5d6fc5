"""The README is run: every bash block works as it stands, in the order of the page.

A block after ``<!-- test: skip, REASON -->`` needs what a test does not have; it is only parsed.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_kvshare.cli.main import COMMANDS
from tests.integration.conftest import ROOT, Workspace

DOCUMENTS = [
    ROOT / name
    for name in (
        *("README.md", "slurm/README.md", "CONTRIBUTING.md", "docs/gpu.md"),
        *("docs/deepspeed.md", "examples/deepspeed/README.md"),
        *("docs/serving.md", "docs/vllm.md", "docs/data.md", "docs/blends.md"),
    )
]
BLOCK = re.compile(r"(<!-- test: skip, [^>]+ -->\n)?```bash\n(.*?)```", re.S)
LINK = re.compile(r"\]\(([^)#:]+)\)")


class Block(NamedTuple):
    """A fenced bash block of a page."""

    code: str
    skipped: bool


def blocks(page: Path) -> list[Block]:
    return [Block(code, bool(skip)) for skip, code in BLOCK.findall(page.read_text("utf-8"))]


def test_the_readme_has_blocks_to_run():
    assert sum(not block.skipped for block in blocks(ROOT / "README.md")) >= 5


def test_readme_commands_run_in_order(workspace: Workspace):
    """Then those of the page on serving, which go on with its model."""
    for block in (*blocks(ROOT / "README.md"), *blocks(ROOT / "docs/serving.md")):
        if not block.skipped:
            done = workspace.bash(block.code)
            assert done.returncode == 0, f"{block.code}\n{done.stdout}\n{done.stderr}"
    latest = workspace.folder / "runs/tour/checkpoint/latest_checkpointed_iteration.txt"
    assert latest.read_text().strip() == "15", "the resumed run goes on to step 15"


def test_commands_of_the_page_on_deepspeed_run(workspace: Workspace):
    for block in blocks(ROOT / "docs/deepspeed.md"):
        if not block.skipped:
            done = workspace.bash(block.code)
            assert done.returncode == 0, f"{block.code}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_are_bash_and_start_files_that_exist(page: Path):
    for block in blocks(page):
        subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
        started = re.findall(r"(?:bash|sbatch [-\w= ]+?) ([\w/.]+\.(?:sh|sbatch))", block.code)
        assert all((ROOT / name).is_file() for name in started)
        assert set(re.findall(r"^kvshare ([\w-]+)", block.code, re.M)) <= set(COMMANDS)


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    broken = [link for link in LINK.findall(page.read_text("utf-8")) if "//" not in link]
    broken = [link for link in broken if not (page.parent / link).exists()]
    assert not broken


@pytest.mark.parametrize("page", ["README.md", "docs/gpu.md"])
def test_tests_named_on_a_page_exist(page: str):
    named = re.findall(r"tests/[\w/]+\.py", (ROOT / page).read_text("utf-8"))
    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]
