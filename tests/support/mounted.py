"""An image and its mount: the real daemon, and how tests run programs beside it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from attrs import define, field

from snapfs.client import mountinfo

MIB = 1 << 20
K64 = 1 << 16
PATIENCE = 400  # seconds: what takes longer hangs, on a machine however busy

ODD_NAMES = [
    "ü.img",
    "a,b.img",
    "a\\040b.img",
    "a\\,b \\.img",
    "new\nline #.img",
    "\udcff.img",
    "u\u2028.img",
]

SNAPFS = [sys.executable, "-m", "snapfs"]
DYING = [sys.executable, str(Path(__file__).with_name("dying.py"))]


def run(
    *command: str | Path, check: bool = True, binary: bool = False
) -> subprocess.CompletedProcess[Any]:
    """Run a program to its end; its output is in an assertion's message if it fails."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=not binary,
        errors=None if binary else "surrogateescape",
        timeout=PATIENCE,
        check=False,
    )
    assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stderr}"
    return done


@define
class Mounted:
    """An image, and its mount while there is one."""

    image: Path
    mountpoint: Path
    options: list[str] = field(factory=list)
    pid: int | None = None

    @property
    def active(self) -> Path:
        return self.mountpoint / "active"

    @property
    def snapshots(self) -> Path:
        return self.mountpoint / "snapshots"

    @property
    def state(self) -> Path:
        return Path(f"{self.image}.snapfs")

    def snapfs(self, *arguments: str | Path, check: bool = True) -> Any:
        return run(*SNAPFS, *arguments, check=check)

    def json(self, verb: str, *arguments: str, check: bool = True) -> Any:
        """What a command says; `status` tells by its exit status only how the mount is."""
        check = check and verb != "status"
        done = self.snapfs(verb, self.mountpoint, *arguments, "--json", check=check)
        return json.loads(done.stdout)

    @property
    def all_options(self) -> list[str]:
        """With those of the whole run, such as no_fastpath; no disk is too slow for a copy."""
        whole = os.environ.get("SNAPFS_TEST_OPTIONS", "").split()
        return [f"cbw-timeout={PATIENCE}", *self.options, *whole]

    def start(self) -> Mounted:
        options = [word for option in self.all_options for word in ("-o", option)]
        self.snapfs("mount", self.image, self.mountpoint, *options)
        self.pid = self.json("status")["mount"]["pid"]
        return self

    def stop(self) -> None:
        self.snapfs("umount", self.mountpoint)
        self.pid = None

    def kill(self) -> None:
        """End the daemon at once, and return when it is gone; the mount stays, dead."""
        assert self.pid is not None
        process = os.pidfd_open(self.pid)
        os.kill(self.pid, signal.SIGKILL)
        select.select([process], [], [])  # it is not our child
        os.close(process)
        self.pid = None

    def write(self, offset: int, data: bytes) -> None:
        with open(self.active, "r+b", buffering=0) as file:
            assert os.pwrite(file.fileno(), data, offset) == len(data)

    def read(self, name: str, offset: int, length: int) -> bytes:
        with open(self.mountpoint / name, "rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)

    def create(self, name: str) -> Path:
        path = self.snapshots / name
        path.touch()
        return path

    def temp_bytes(self, name: str) -> int:
        return int(os.getxattr(self.snapshots / name, "user.snapfs.temp_bytes"))


def helpers_of(daemon: int) -> list[int]:
    """The processes that make calls on the daemon's own mount; no children of a daemon that is
    in the background."""
    command = Path(f"/proc/{daemon}/cmdline").read_bytes()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.name != str(daemon) and (process / "cmdline").read_bytes() == command:
                found.append(int(process.name))
    return found


def let_others_in(path: Path) -> None:
    """Let other users reach what is below a directory, which pytest keeps for us alone."""
    while path != path.parent:
        if not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o011)
        path = path.parent


def mounts_below(path: Path) -> list[str]:
    found = [each.mountpoint for each in mountinfo.mounts()]
    return [each for each in found if each.startswith(str(path))]


def terminate(pid: int) -> None:
    """SIGTERM; returns when the process is gone."""
    process = os.pidfd_open(pid)
    os.kill(pid, signal.SIGTERM)
    wait_end(process)


def wait_end(process: int) -> None:
    """Of a process, by its pidfd, which is closed."""
    assert select.select([process], [], [], PATIENCE)[0]
    os.close(process)


def is_clean(disk: Mounted) -> bool:
    """Was it unmounted in order?"""
    return bool(json.loads((disk.state / "manifest.json").read_text())["clean"])
