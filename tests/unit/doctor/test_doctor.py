"""The doctor finds what is missing, of a wrong version or not what its name says."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from megatron_kvshare.cli import doctor
from megatron_kvshare.doctor import checks as checks
from megatron_kvshare.doctor.checks import OPTIONAL, REQUIRED, Package, check_package

ROOT = Path(__file__).parents[3]
CORE = Package("megatron-core", "0.16.1", "0.20", "layers")


def with_version(monkeypatch, version):
    monkeypatch.setattr(checks, "installed_version", lambda name: version)


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("0.16.1", "ok"),
        ("0.19.2", "ok"),
        ("0.19.2+local.1", "ok"),
        ("0.16.0", "wrong"),
        ("0.20", "wrong"),
        ("0.20.0rc1", "wrong"),
        (None, "missing"),
    ],
)
def test_versions(version, state, monkeypatch):
    with_version(monkeypatch, version)
    finding = check_package(CORE, "required")
    assert finding.state == state
    assert finding.stops_work == (state != "ok")
    assert bool(finding.next_step) == (state != "ok")


def test_a_missing_extra_stops_nothing(monkeypatch):
    with_version(monkeypatch, None)
    finding = check_package(Package("wandb", "", "", "tracking"), "extra tracking", "tracking")
    assert finding.state == "missing"
    assert not finding.stops_work
    assert "[tracking]" in finding.next_step


def make_apex(folder: Path, module: str) -> None:
    (folder / "apex" / module).mkdir(parents=True)
    (folder / "apex" / "__init__.py").write_text("raise RuntimeError('must not be imported')")


@pytest.mark.parametrize(("module", "state"), [("scaffolds", "wrong"), ("optimizers", "ok")])
def test_the_apex_trap(module, state, tmp_path, monkeypatch):
    make_apex(tmp_path, module)
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = checks.check_apex()
    assert finding.state == state
    assert ("pip uninstall apex" in finding.next_step) == (state == "wrong")


class TestCompilation:
    """Whether a GPU's kernels can be compiled; the program is another, for want of a GPU."""

    @pytest.fixture(autouse=True)
    def a_gpu(self, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("megatron_kvshare.kernels.compiling.compile_fault", lambda: None)

    @pytest.mark.parametrize(
        ("program", "found"),
        [
            ("pass", "a kernel was compiled and run"),
            ("raise RuntimeError('no Python.h')", "RuntimeError: no Python.h"),
            ("import os; os._exit(7)", "exit code 7"),
            ("import time; time.sleep(60)", "a tiny kernel was not compiled in 1 s"),
        ],
    )
    def test_what_a_process_shows(self, program, found, monkeypatch):
        monkeypatch.setattr(checks, "_TINY_KERNEL", program)
        monkeypatch.setattr(checks, "COMPILE_SECONDS", 1)
        finding = checks.check_compilation()
        assert finding.found == found and not finding.stops_work
        assert bool(finding.next_step) == (finding.state == "wrong") == (program != "pass")

    def test_what_is_known_without_one(self, monkeypatch):
        fault = "there is no C compiler"
        monkeypatch.setattr("megatron_kvshare.kernels.compiling.compile_fault", lambda: fault)
        finding = checks.check_compilation()
        assert (finding.state, finding.found) == ("wrong", fault)
        assert "plain kernels run then" in finding.next_step


def test_without_a_gpu_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert checks.check_compilation() is None


def test_the_report_of_this_machine(capsys):
    assert doctor.run([]) == 0
    shown = capsys.readouterr().out
    assert "Ready to train." in shown
    assert all(package.name in shown for package in REQUIRED)
    assert doctor.run(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and {"name", "state", "next_step"} <= report["findings"][0].keys()


def test_something_required_that_is_missing_fails(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "all_findings", lambda: [check_package(CORE, "required")])
    with_version(monkeypatch, None)
    assert doctor.run([]) == doctor.EXIT_NOT_READY
    shown = capsys.readouterr().out
    assert "MISSING" in shown and "Not ready: megatron-core." in shown


def test_a_broken_cpu_backend_is_reported(monkeypatch):
    from megatron_kvshare.megatron_api import platform, probe

    def broken(backend):
        raise ImportError("no megatron")

    monkeypatch.setattr(platform, "activate", broken)
    assert probe.cpu_backend_fault() == "ImportError: no megatron"


def test_the_doctor_knows_what_setup_installs(monkeypatch):
    """setup.py and the doctor name the same packages with the same bounds."""
    called = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **arguments: called.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    assert requirements(called["install_requires"]) == wanted(REQUIRED)
    for extra, packages in OPTIONAL.items():
        assert requirements(called["extras_require"][extra]) == wanted(packages)


def requirements(lines: list[str]) -> dict[str, set[str]]:
    names = [re.match(r"[\w-]+", line).group() for line in lines]
    bounds = [
        set(filter(None, line[len(name) :].split(",")))
        for name, line in zip(names, lines, strict=True)
    ]
    return dict(zip(names, bounds, strict=True))


def wanted(packages: tuple[Package, ...]) -> dict[str, set[str]]:
    return {
        package.name: {f">={package.at_least}" for _ in package.at_least[:1]}
        | {f"<{package.below}" for _ in package.below[:1]}
        for package in packages
    }
