"""Scripts say what they do when asked, and refuse what they do not know; and do nothing else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"
NAMES = sorted(
    path.name for path in SCRIPTS.iterdir() if path.is_file() and os.access(path, os.X_OK)
)


@pytest.fixture
def call(tmp_path: Path):
    """Run a script where nothing that it could install with, or begin, is to be found."""
    for tool in ("apt-get", "dpkg-query", "pip", "mount", "losetup"):
        (tmp_path / tool).write_text(f"#!/bin/sh\necho {tool} >>{tmp_path}/used\n")
        (tmp_path / tool).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [SCRIPTS / name, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
            env=environment,
            timeout=400,
        )
        assert not (tmp_path / "used").exists()
        return done

    return run


def test_there_are_scripts():
    assert {"bootstrap", "quickstart", "install", "bench", "soak", "test"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_a_script_does(call, name):
    done = call(name, "--help")
    assert (0, "") == (done.returncode, done.stderr)
    assert f"scripts/{name}" in done.stdout or f"usage: {name}" in done.stdout
    assert len(done.stdout.splitlines()) > 2


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["--help-me", "x"]])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "test"])  # pytest's go there
def test_what_a_script_does_not_know_is_refused(call, name, arguments):
    done = call(name, *arguments)
    assert (2, "") == (done.returncode, done.stdout)
    assert "usage: " in done.stderr
