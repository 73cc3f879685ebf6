"""A build of snapfs: a checkout with its .venv, this one or another."""

from __future__ import annotations

import os
import select
import subprocess
from dataclasses import dataclass
from pathlib import Path


class Failed(Exception):
    """A program that a measurement needs has failed; what it said."""


def run(*command: object) -> str:
    """Run a program; its output.  Raises Failed.

    A signal to our process group does not reach it: a daemon that has begun must
    be there to be ended, and who uses a mount must be gone.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, process_group=0)
    if done.returncode:
        raise Failed(f"{command[0]} failed:\n{done.stderr.strip()}")
    return done.stdout


def wait_for_end(pid: int) -> None:
    """Return when a process is gone, be it our child or not."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([process], [], [])
    os.close(process)


@dataclass(frozen=True)
class Build:
    """What is in one checkout.  `root`: its directory."""

    root: Path

    @property
    def snapfs(self) -> Path:
        return self.root / ".venv/bin/snapfs"

    def patched(self, change: str) -> tuple[object, ...]:
        """A program that is snapfs with a change."""
        code = f"import mmap, os, sys, time; from snapfs import cli\n{change}\n"
        return self.root / ".venv/bin/python", "-c", f"{code}sys.exit(cli.main(sys.argv[1:]))"

    def bootstrap(self, *options: str) -> None:
        """Build it, if it is not; quick if it is.  What it says goes to our stderr."""
        script = self.root / "scripts/bootstrap"
        if not script.exists():
            raise Failed(f"{self.root} is no checkout of snapfs: it has no scripts/bootstrap")
        if subprocess.run([script, *options], check=False).returncode:
            raise Failed(f"{script} failed")

    def describe(self) -> str:
        """Where it is and, if git knows, what."""
        words = ["git", "-C", str(self.root), "describe", "--always", "--dirty", "--exclude=*"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or "no commit"
        return f"{self.root} ({commit})"
