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

SEMANTICS = "mount/test_semantics.py"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A directory with snapfs in it, its C with the checks."""
    compiler = shutil.which("gcc")
    package = ROOT / "snapfs"
    if not compiler or not (package / "port" / "fastpath.c").exists():
        pytest.skip("needs gcc and the source")
    where = tmp_path_factory.mktemp("sanitized")
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(package, where / "snapfs", ignore=ignored)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for module in MODULES:
        command = [compiler, "-g", "-O1", "-shared", "-fPIC", "-D_FILE_OFFSET_BITS=64"]
        command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        command += ["-I/usr/include/fuse3", "-I/usr/local/include/fuse3"]
        command += ["-isystem", sysconfig.get_path("include")]
        command += [str(ROOT / source) for source in module["sources"]]
        command += ["-o", f"{where}/{module['name'].replace('.', '/')}{suffix}"]
        command += ["-lfuse3", "-ldl"]
        subprocess.run(command, check=True)
    return where


@pytest.mark.slow
@pytest.mark.parametrize(
    "tests",
    [
        ("unit/fuse/test_fastpath.py", "property/test_fastpath.py"),
        (
            "mount/test_direct.py",
            f"{SEMANTICS}::test_a_snapshot_keeps_what_is_overwritten",
            f"{SEMANTICS}::test_each_of_several_snapshots_has_its_own_moment_whichever_goes_first",
            f"{SEMANTICS}::test_discard_frees_and_forbids",
        ),
    ],
    ids=["unit", "mount"],
)
def test_the_fast_path_under_sanitizers(built, tmp_path, tests):
    library = subprocess.check_output(["gcc", "-print-file-name=libasan.so"], text=True)
    program = (
        "import subprocess, sys, snapfs, pytest; print(snapfs.__file__);"
        "subprocess.run([sys.executable, '-c', 'import snapfs; print(snapfs.__file__)']);"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-u", "-c", program, "-c", ROOT / "pyproject.toml",
         f"--rootdir={ROOT}", f"--basetemp={tmp_path}/tests",
         *(f"{ROOT}/tests/{name}" for name in tests)],
        cwd=built,
        env={
            **os.environ,
            # The leaks are the interpreter's own.
            "ASAN_OPTIONS": f"detect_leaks=0:log_path={tmp_path}/report",
            "UBSAN_OPTIONS": f"log_path={tmp_path}/report",
            "HYPOTHESIS_PROFILE": "dev",
            "LD_PRELOAD": library.strip(),
            "PYTHONMALLOC": "malloc",
            "PYTHONPATH": str(built),
        },
        capture_output=True,
        text=True,
        timeout=115,
        check=False,
    )  # fmt: skip
    reports = "".join(path.read_text() for path in tmp_path.glob("report*"))
    assert (0, "") == (done.returncode, reports), done.stdout + done.stderr
    # Not the build without them, neither here nor in the daemons.
    assert 2 == done.stdout.count(str(built / "snapfs"))
