"""snapfs with its C built under address and undefined-behaviour checks."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(where: Path) -> Path:
    """A directory with snapfs in it, its C with the checks; skips where that cannot be built."""
    compiler = shutil.which("gcc")
    package = ROOT / "snapfs"
    if not compiler or not (package / "port" / "fastpath.c").exists():
        pytest.skip("needs gcc and the source")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(package, where / "snapfs", ignore=ignored)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    builds = []
    for module in project["tool"]["setuptools"]["ext-modules"]:
        command = [compiler, "-g", "-O1", "-shared", "-fPIC", "-D_FILE_OFFSET_BITS=64"]
        command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        command += ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
        command += ["-I/usr/include/fuse3", "-I/usr/local/include/fuse3"]
        command += ["-isystem", sysconfig.get_path("include")]
        command += [str(ROOT / source) for source in module["sources"]]
        command += ["-o", f"{where}/{module['name'].replace('.', '/')}{suffix}"]
        builds.append(subprocess.Popen([*command, "-lfuse3", "-ldl"]))
    assert [0 for _ in builds] == [each.wait() for each in builds]
    return where


def environment(built: Path) -> dict[str, str]:
    """What a program needs to run with it; the leaks are the interpreter's own."""
    library = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True)
    return {
        "ASAN_OPTIONS": "detect_leaks=0",
        "LD_PRELOAD": library.strip(),
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(built),
    }
