"""The rules of the code base that a reader relies on, read from the source itself.

Imports go down only; configuration and sharing maps need no torch; megatron-core is known to one
package; files, classes and functions stay small.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_kvshare"
NAME = PACKAGE.name

LEVELS = {
    "errors": 0,
    "output": 0,
    "config": 1,
    "ownership": 1,
    "sharing": 1,
    "spec": 2,
    "megatron_api": 2,
    "model": 3,
    "pipeline": 4,
    "data": 3,
    "checkpoint": 4,
    "engines": 5,
    "train": 6,
    "huggingface": 6,
    "inference": 7,
    "cli": 8,
    "__main__": 9,
}
ALLOWED_SIBLINGS = {("config", "sharing")}
"""Configuration is validated with the map it names."""
TORCH_FREE = ("errors", "output", "config", "ownership", "sharing", "spec")
HEAVY = {"torch", "megatron", "transformers", "deepspeed", "numpy"}

SOURCES = sorted(PACKAGE.rglob("*.py"))
ALL_CODE = sorted(
    path
    for folder in ("megatron_kvshare", "tests", "tools", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
)

STAND_ALONE = {"configuration_kvshare.py", "modeling_kvshare.py"}
"""Travel with exports: a whole model in one file each, with the signatures transformers calls."""

MAX_FILE_LINES = 400
MAX_STAND_ALONE_LINES = 900
MAX_FUNCTION_LINES = 60
MAX_CLASS_LINES = 250
MAX_PARAMETERS = 7
MAX_NESTING = 4
MAX_LINE_LENGTH = 100

BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


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
        if target == part or target not in LEVELS or (part, target) in ALLOWED_SIBLINGS:
            continue
        if LEVELS[target] >= LEVELS[part]:
            yield line, module


def test_every_part_of_the_package_has_a_level():
    parts = {part_of(path) for path in SOURCES} - {"__init__"}
    assert parts <= set(LEVELS)


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


# Sizes ------------------------------------------------------------------------------------------


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Deepest block inside a function; an `elif` continues its `if`, inner functions start anew."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deeper = isinstance(child, BLOCKS) and not is_elif
        deepest = max(deepest, nesting(child, depth + deeper))
    return deepest


def too_big(path: Path) -> Iterator[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    alone = path.name in STAND_ALONE
    if len(lines) > (MAX_STAND_ALONE_LINES if alone else MAX_FILE_LINES):
        yield f"{len(lines)} lines in the file"
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_LINE_LENGTH:
            yield f"line {number}: {len(line)} characters"
    for node in ast.walk(parsed(path)):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield from (fault for fault in too_big_definition(node) if not alone)


def too_big_definition(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef,
) -> Iterator[str]:
    where = f"line {node.lineno}, {node.name}:"
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    if isinstance(node, ast.ClassDef):
        if length > MAX_CLASS_LINES:
            yield f"{where} class of {length} lines"
        return
    if length > MAX_FUNCTION_LINES:
        yield f"{where} function of {length} lines"
    if parameters(node) > MAX_PARAMETERS:
        yield f"{where} {parameters(node)} parameters"
    if nesting(node) > MAX_NESTING:
        yield f"{where} nested {nesting(node)} deep"


@pytest.mark.parametrize("path", ALL_CODE, ids=shown)
def test_sizes_stay_readable(path):
    found = list(too_big(path))
    assert not found, f"{shown(path)}: " + "; ".join(found)


@pytest.mark.parametrize("path", [p for p in SOURCES if p.read_text().strip()], ids=shown)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(parsed(path)), f"{shown(path)} has no docstring"
