"""The rules of the code base that a reader relies on, read from the source itself.

Imports go down only, by the table of CONTRIBUTING.md; configuration, maps and plans need no torch;
megatron-core is known to one package; every module says what it is for.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_kvshare"
NAME = PACKAGE.name


def levels() -> dict[str, int]:
    """The table of CONTRIBUTING.md: package, or module at the root -> its level."""
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", table, re.MULTILINE)
    return {
        name: int(level)
        for level, names in rows
        for name in re.findall(r"`(\w+)(?:/|\.py)`", names)
    }


LEVELS = levels()
TORCH_FREE = (
    "errors",
    "output",
    "config",
    "costs",
    "ownership",
    "rope",
    "sharing",
    "spec",
    "stages",
    "tables",
)
HEAVY = {"torch", "megatron", "transformers", "deepspeed", "numpy"}

SOURCES = sorted(PACKAGE.rglob("*.py"))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    """The package, or module at the root, a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import anywhere in the file.

    Names imported from a package are reported too, since they may be its modules.
    """
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = absolute(path, node)
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def absolute(path: Path, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    package = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
    return ".".join((*package, *filter(None, [node.module])))


def upward_edges(part: str, modules: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Imports of a part of the package at the same or a higher level."""
    for line, module in modules:
        names = module.split(".")
        if names[0] != NAME or len(names) < 2:
            continue
        target = names[1]
        if target == part or target not in LEVELS:
            continue
        if LEVELS[target] >= LEVELS[part]:
            yield line, module


def test_every_part_of_the_package_has_a_level():
    assert {part_of(path) for path in SOURCES} - {"__init__"} == set(LEVELS)


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_imports_go_down_only(path):
    part = part_of(path)
    if part == "__init__":
        # The package itself may name things of its lowest level only; the rest when asked for.
        edges = [found for found in imported_modules(path) if found[1].startswith(NAME)]
        assert all(module.split(".")[1] == "errors" for _, module in edges)
        return
    edges = list(upward_edges(part, imported_modules(path)))
    assert not edges, f"{shown(path)} is at level {LEVELS[part]} and imports {edges}"


def test_the_import_rule_has_teeth():
    edges = upward_edges("model", iter([(1, "megatron_kvshare.train.loop"), (2, "torch")]))
    assert list(edges) == [(1, "megatron_kvshare.train.loop")]
    assert list(upward_edges("data", iter([(3, "megatron_kvshare.checkpoint")])))
    assert list(upward_edges("sharing", iter([(4, "megatron_kvshare.config")])))
    assert not list(upward_edges("config", iter([(5, "megatron_kvshare.sharing.map")])))


CONFIG = {
    "flags": 0,
    "fields": 0,
    "blend": 0,
    "launch": 0,
    "data_files": 1,
    "derive": 1,
    "rules": 2,
    "deepspeed": 2,
    "pretrain": 3,
}
"""Inside ``config/``: from reading to rules. What is on one level knows nothing of each other."""


def part_of_config(path: Path) -> str:
    """The folder, or module, of ``config/`` a file belongs to."""
    return path.relative_to(PACKAGE / "config").parts[0].removesuffix(".py")


def upward_in_config(part: str, modules: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Imports of a part of ``config/`` at the same or a higher level inside it."""
    for line, module in modules:
        names = module.split(".")
        if names[:2] != [NAME, "config"] or len(names) < 3:
            continue
        if names[2] != part and CONFIG.get(names[2], -1) >= CONFIG[part]:
            yield line, module


CONFIG_SOURCES = [
    p for p in SOURCES if part_of(p) == "config" and p != PACKAGE / "config" / "__init__.py"
]


def test_every_part_of_the_configuration_has_a_level():
    assert {part_of_config(path) for path in CONFIG_SOURCES} == set(CONFIG)


@pytest.mark.parametrize("path", CONFIG_SOURCES, ids=shown)
def test_configuration_is_read_then_derived_then_judged(path):
    edges = list(upward_in_config(part_of_config(path), imported_modules(path)))
    assert not edges, f"{shown(path)} imports {edges}"


def test_the_rule_inside_the_configuration_has_teeth():
    edges = upward_in_config("flags", iter([(1, f"{NAME}.config.fields.data"), (2, "yaml")]))
    assert list(edges) == [(1, f"{NAME}.config.fields.data")]
    assert list(upward_in_config("blend", iter([(3, f"{NAME}.config.rules")])))
    assert not list(upward_in_config("rules", iter([(4, f"{NAME}.config.derive")])))


def test_settings_are_derived_once():
    """Everybody else is handed a ModelSpec or a RunPlan; rules check what will be derived."""
    found = {
        str(path.relative_to(PACKAGE))
        for path in SOURCES
        if part_of(path) not in ("config", "spec")
        and any(module == f"{NAME}.config.derive" for _, module in imported_modules(path))
    }
    assert found == {"checkpoint/recipe.py", "cli/plan.py"}


@pytest.mark.parametrize("path", [p for p in SOURCES if part_of(p) in TORCH_FREE], ids=shown)
def test_low_levels_need_no_heavy_library(path):
    heavy = [found for found in imported_modules(path) if found[1].split(".")[0] in HEAVY]
    assert not heavy


@pytest.mark.parametrize("path", [p for p in SOURCES if part_of(p) != "megatron_api"], ids=shown)
def test_megatron_core_is_imported_in_one_package_only(path):
    foreign = [found for found in imported_modules(path) if found[1].split(".")[0] == "megatron"]
    assert not foreign


@pytest.mark.parametrize("path", [p for p in SOURCES if p.read_text().strip()], ids=shown)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(parsed(path)), f"{shown(path)} has no docstring"


def files_of(module: str) -> Iterator[Path]:
    """What importing a module of the package runs; nothing for a name that is no module."""
    parts = module.split(".")[1:]
    places = [PACKAGE.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    for place in places:
        yield from (f for f in (place / "__init__.py", place.with_suffix(".py")) if f.is_file())


def test_the_plugin_of_vllm_needs_torch_and_vllm_alone():
    """Its environment has no megatron-core; vLLM brings transformers and packaging."""
    there = {*sys.stdlib_module_names, NAME, "torch", "vllm", "transformers", "packaging"}
    waiting, seen = list((PACKAGE / "vllm_plugin").glob("*.py")), set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for line, module in imported_modules(path):
            assert module.split(".")[0] in there, f"{shown(path)}:{line} imports {module}"
            if module.split(".")[0] == NAME:
                waiting += files_of(module)
    assert {"sharing/map.py", "errors.py", "conversion/config_keys.py"} <= {
        str(path.relative_to(PACKAGE)) for path in seen
    }
