"""Exports pass the tests that transformers has for all its models, where its Llama does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.integration import side_packages
from tests.integration.conftest import ROOT

pytestmark = [pytest.mark.nightly, pytest.mark.download]
HERE = Path(__file__).parent
PACKAGE = "transformers_tests"
LEFT_OUT = {
    "exporters/test_export.py": "class ExportTesterMixin: pass",
    "generation/test_utils.py": "class GenerationTesterMixin: pass",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}",
}
"""What the tests import and transformers' source package has not: so these are not run."""
NOT_RUN = "not test_num_layers_is_small and not test_generation_tester_mixin_inheritance"
"""They are about the tests themselves: a map needs some layers, generation is left out."""
RECORDER = (
    "states are collected where they are computed, not by transformers' hooks, which would collect "
    "every sweep of a cyclic map: tests/parity/test_export_outputs.py"
)
NOT_AS_LLAMA = {
    "test_capture_outputs_decorator": RECORDER,
    "test_can_capture_specific_layers_hidden_states": RECORDER,
    "test_model_rope_scaling_frequencies": "frequencies are computed in every forward and no "
    "module holds them: tests/parity/test_export_rotary.py",
    "test_tp_plan_matches_params": "there is no plan for tensor parallelism: one process",
    "test_bc_cache_name_forward": "either name of a cache is right, so neither is warned of",
}
"""What Llama passes, or skips, and an export does not, and why."""


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    """A folder with the tests of the installed transformers as a package, and ours among them."""
    name = f"transformers=={version('transformers')}"
    archives = ROOT / "runs" / "sources"
    found = archives / f"{name.replace('==', '-')}.tar.gz"
    if not found.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--no-build-isolation", "--dest", str(archives), name]
        subprocess.run(command, check=True)
    root = tmp_path_factory.mktemp("suite")
    with tarfile.open(found) as archive:
        archive.extractall(root, filter="data")
    (package,) = root.glob("*/tests")
    package = package.rename(root / PACKAGE)
    for left_out, content in LEFT_OUT.items():
        (package / left_out).parent.mkdir(exist_ok=True)
        (package / left_out).write_text(content)
    for folder in {package, *((package / name).parent for name in LEFT_OUT)}:
        (folder / "__init__.py").touch()
    shutil.copy(HERE / "common_tests.py", package / "test_ours.py")
    return root


@cache
def results(root: Path, case: str) -> dict[str, str]:
    """Of every test "passed", "skipped" or "failed"."""
    packages = side_packages.install("common-tests", "parameterized==0.9.0", "accelerate==1.15.0")
    more = {"PYTHONPATH": f"{packages}:{ROOT}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", NOT_RUN]
    command += [f"--junitxml={case}.xml", f"{PACKAGE}/test_ours.py::{case}"]
    environment = {**os.environ, **more, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    found = {}
    for test in ElementTree.parse(root / f"{case}.xml").iter("testcase"):
        about = {part.tag for part in test}
        failed = "failed" if about & {"failure", "error"} else "passed"
        found[test.attrib["name"]] = "skipped" if "skipped" in about else failed
    return found


@pytest.mark.parametrize("case", ["AcyclicTest", "WindowedTest", "CyclicTest"])
def test_what_llama_passes_passes(case, suite):
    wanted, got = results(suite, "LlamaTest"), results(suite, case)
    assert sum(result == "passed" for result in wanted.values()) > 100
    assert "failed" not in wanted.values()
    assert set(got) == set(wanted)
    worse = {
        name: result
        for name, result in got.items()
        if result == "failed" or (result == "skipped" and wanted[name] == "passed")
    }
    assert set(worse) == set(NOT_AS_LLAMA), worse
