"""The fast path's tests, junk requests included, under address and undefined-behaviour checks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]


@pytest.mark.slow
def test_the_fast_path_under_sanitizers(tmp_path):
    compiler = shutil.which("gcc")
    package = ROOT / "snapfs"
    if not compiler or not (package / "fastpath.c").exists():
        pytest.skip("needs gcc and the source")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(package, tmp_path / "snapfs", ignore=ignored)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for module in MODULES:
        command = [compiler, "-g", "-O1", "-shared", "-fPIC", "-D_FILE_OFFSET_BITS=64"]
        command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        command += ["-I/usr/include/fuse3", "-I/usr/local/include/fuse3"]
        command += ["-isystem", sysconfig.get_path("include")]
        command += [str(ROOT / source) for source in module["sources"]]
        command += ["-o", f"{tmp_path}/{module['name'].replace('.', '/')}{suffix}"]
        command += ["-lfuse3", "-ldl"]
        subprocess.run(command, check=True)
    library = subprocess.check_output([compiler, "-print-file-name=libasan.so"], text=True)
    program = (
        "import sys, snapfs, pytest; print(snapfs.__file__);"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    tests = ("tests/unit/test_fastpath.py", "tests/property/test_fastpath.py")
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, f"--basetemp={tmp_path}/tests", *tests],
        cwd=ROOT,
        env={
            **os.environ,
            "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
            "HYPOTHESIS_PROFILE": "dev",
            "LD_PRELOAD": library.strip(),
            "PYTHONMALLOC": "malloc",
            "PYTHONPATH": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    assert str(tmp_path / "snapfs") in done.stdout  # not the build without them
