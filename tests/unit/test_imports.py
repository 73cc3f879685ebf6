"""Which folder may import which: the table of CONTRIBUTING.md, held against the code."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "snapfs"
FOR_ALL = {"errors", "strictjson"}
TOP = {"__init__", "__main__"}  # the version, and `python -m snapfs`


def allowed() -> dict[str, set[str]]:
    """Folder -> what its modules may import of the others: folders, or single modules."""
    text = (ROOT / "CONTRIBUTING.md").read_text().split("Who may import whom")[1].split("\n\n")[1]
    rows = re.findall(r"^    (\w+) +-> (.*)$", text, re.MULTILINE)
    return {folder: set(re.findall(r"[\w.]+", names)) - {"nobody"} for folder, names in rows}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """Without the package: engine.layers; of a folder's __init__ the folder."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


EXISTING = {name_of(path) for path in modules()} | {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.pyi")
}


def imports(path: Path, *, late: bool = True) -> Iterator[str]:
    """Modules of snapfs that one imports, as by `name_of`; `late`: within functions, too."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = ["snapfs", *path.relative_to(PACKAGE).parent.parts]
            base = parents[: len(parents) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            if name.split(".")[0] == "snapfs":
                inside = name.removeprefix("snapfs").removeprefix(".")
                yield inside if inside in EXISTING else inside.rpartition(".")[0]


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_folder_imports_only_what_it_may(path):
    folder = name_of(path).split(".")[0]
    if folder in TOP | FOR_ALL | {""}:
        return
    table = allowed()
    assert folder in table, f"the folder {folder} is not in CONTRIBUTING.md"
    for name in imports(path):
        other = name.split(".")[0]
        permitted = other in {folder, *FOR_ALL, ""} or {other, name} & table[folder]
        assert permitted, f"{name_of(path)} imports {name}: {folder} may not import {other}"


def test_the_table_names_every_folder_and_nothing_else():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    table = allowed()
    assert folders == set(table)
    known = folders | EXISTING
    assert [] == [name for names in table.values() for name in names if name not in known]


def test_there_is_no_circle():
    graph = {name_of(path): {*imports(path)} - {name_of(path)} for path in modules()}
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_what_everybody_may_import_knows_nobody():
    for name in FOR_ALL:
        assert {*imports(PACKAGE / f"{name}.py")} <= FOR_ALL


def outside(path: Path) -> set[str]:
    """Packages that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_the_engine_is_pure():
    forbidden = {"pyfuse3", "argparse", "socket", "subprocess", "mmap", "pathlib", "json"}
    for path in (PACKAGE / "engine").glob("*.py"):
        assert set() == outside(path) & forbidden, path.name


def test_only_the_kernels_side_knows_pyfuse3():
    users = {name_of(path) for path in modules() if "pyfuse3" in outside(path)}
    assert {"fuse.fusefs", "fuse.session"} == users


def test_what_tests_share_is_in_support():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                foreign = [name for name in names if name.startswith(("test_", "conftest"))]
                assert not (node.level or foreign), f"{path}: {ast.unparse(node)}"
