"""Each module imports only from the layers above it in CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "snapfs"
PURE = {
    "errors", "geometry", "bitmap", "reqlist", "linux", "offload", "image",
    "rounds", "snapshot", "space", "layers", "copier", "views", "moment", "keeper", "active", "cbw",
    "report",
}  # fmt: skip


def ranks() -> dict[str, int]:
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## Layers")[1].split("##")[0]
    lines = re.findall(r"^    (\S.*?)(?:  .*)?$", text, re.MULTILINE)
    return {name: rank for rank, line in enumerate(lines) for name in line.split()}


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if path.stem not in ("__init__", "__main__")]


def imported(path: Path) -> set[str]:
    """First parts of what a module imports, those of snapfs without the dot."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.module is None:
                found |= {alias.name for alias in node.names}
            else:
                found.add(node.module.split(".")[0])
    return found


def rank_of(path: Path) -> str:
    return "cli" if path.parent.name == "cli" else path.stem


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_imports_go_up_only(path):
    order = ranks()
    mine = rank_of(path)
    assert mine in order, f"{mine} is not in CONTRIBUTING.md"
    for name in imported(path) & set(order):
        assert order[name] <= order[mine], f"{mine} imports {name}"


def test_the_engine_is_pure():
    for name in PURE:
        outside = imported(PACKAGE / f"{name}.py")
        assert not outside & {"pyfuse3", "argparse", "socket", "subprocess", "requestfilter"}, name


def test_only_fusefs_and_the_daemon_that_starts_it_import_pyfuse3():
    users = {path.stem for path in modules() if "pyfuse3" in imported(path)}
    assert {"fusefs", "daemon"} == users
