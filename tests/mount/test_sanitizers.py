"""The fast path's tests, junk requests included, under address and undefined-behaviour checks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support import sanitized
from tests.support.sanitized import ROOT

SEMANTICS = "mount/test_semantics.py"


@pytest.mark.slow
@pytest.mark.xdist_group("sanitizers")  # which are built once
@pytest.mark.timeout(1600)
@pytest.mark.parametrize(
    "tests",
    [
        (
            "unit/fuse/test_fastpath_reads.py",
            "unit/fuse/test_fastpath_writes.py",
            "unit/fuse/test_fastpath_copies.py",
            "unit/fuse/test_fastpath_requests.py",
            "property/test_fastpath.py",
        ),
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
            **sanitized.environment(built),
            "ASAN_OPTIONS": f"detect_leaks=0:log_path={tmp_path}/report",
            "UBSAN_OPTIONS": f"log_path={tmp_path}/report",
            "HYPOTHESIS_PROFILE": "dev",
        },
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )  # fmt: skip
    reports = "".join(path.read_text() for path in tmp_path.glob("report*"))
    assert (0, "") == (done.returncode, reports), done.stdout + done.stderr
    # Not the build without them, neither here nor in the daemons.
    assert 2 == done.stdout.count(str(built / "snapfs"))
