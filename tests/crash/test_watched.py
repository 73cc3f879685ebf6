"""With durability=power every sync is where it must be, those of native threads included.

The tests are in watched.py; they need a library that is loaded before all else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_native_copies_survive_a_power_cut_at_any_moment(tmp_path):
    compiler = shutil.which("gcc")
    if not compiler:
        pytest.skip("needs gcc")
    library = tmp_path / "watch.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, SUPPORT / "watch.c", "-o", library, "-ldl"], check=True)
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            f"--basetemp={tmp_path}/tests", SUPPORT / "watched.py",
        ],
        cwd=SUPPORT.parents[1],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )  # fmt: skip
    assert 0 == done.returncode, done.stdout + done.stderr
