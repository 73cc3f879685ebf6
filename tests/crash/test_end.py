"""The end of a daemon that is busy: nothing is forgotten, nobody hangs."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapfs.linux import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate

from ..mount.conftest import SNAPFS, Mounted, _needs_fuse, mount, run  # noqa: F401 - fixtures

pytestmark = pytest.mark.mount

K64 = 1 << 16
SIZE = 64 * K64

# A daemon whose punches and reads of the image wait for a line on a pipe.
HELD = """
import os, sys
import snapfs.image as image
from snapfs import cli
def held(call):
    def wrapped(*arguments):
        os.write(int(sys.argv[1]), b"x")
        os.read(int(sys.argv[2]), 1)
        return call(*arguments)
    return wrapped
image._punch = held(image._punch)
sys.exit(cli.main(["mount", *sys.argv[3:]]))
"""


class Held:
    """A daemon in the foreground whose punches wait for `go`."""

    def __init__(self, disk: Mounted) -> None:
        self._reached, reached = os.pipe()
        go, self._go = os.pipe()
        ready, told = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", HELD, str(reached), str(go), disk.image, disk.mountpoint,
             "-f", "--ready-fd", str(told)],
            pass_fds=(reached, go, told),
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for fd in (reached, go, told):
            os.close(fd)
        assert os.read(ready, 9) == b"READY\n"
        os.close(ready)

    def wait_reached(self) -> None:
        assert os.read(self._reached, 1)

    def go(self) -> None:
        os.close(self._go)

    def finish(self) -> tuple[int, str]:
        stderr = self.process.communicate(timeout=30)[1]
        os.close(self._reached)
        return self.process.returncode, stderr


@pytest.fixture
def held(mount) -> Iterator[tuple[Mounted, Held]]:  # noqa: F811
    disk = mount(os.urandom(SIZE), start=False)
    daemon = Held(disk)
    yield disk, daemon
    if daemon.process.poll() is None:
        daemon.process.kill()
        daemon.finish()


def punch(fd: int, offset: int, results: list[int]) -> None:
    try:
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, K64)
    except OSError as error:
        results.append(error.errno)
    else:
        results.append(0)


def test_sigterm_while_a_punch_is_under_way_forgets_no_snapshot(held):
    disk, daemon = held
    moment = disk.active.read_bytes()
    disk.create("s")
    results: list[int] = []
    fd = os.open(disk.active, os.O_RDWR)
    thread = threading.Thread(target=punch, args=(fd, 0, results))
    thread.start()
    daemon.wait_reached()
    daemon.process.send_signal(signal.SIGTERM)
    with contextlib.suppress(OSError):
        while os.listdir(disk.mountpoint):
            pass  # until the session has ended, with the punch still under way
    daemon.go()
    status, stderr = daemon.finish()
    thread.join()
    with contextlib.suppress(OSError):
        os.close(fd)
    assert "Traceback" not in stderr
    assert 0 == status, stderr
    disk.start()
    assert ["s"] == os.listdir(disk.snapshots)
    assert moment == (disk.snapshots / "s").read_bytes()


def test_a_killed_daemon_with_a_punch_under_way_hangs_nobody(held):
    disk, daemon = held
    disk.create("s")
    results: list[int] = []
    fd = os.open(disk.active, os.O_RDWR)
    thread = threading.Thread(target=punch, args=(fd, 0, results))
    thread.start()
    daemon.wait_reached()
    daemon.process.kill()
    daemon.finish()
    thread.join(20)
    assert not thread.is_alive()
    assert results[0] != 0
    with contextlib.suppress(OSError):
        os.close(fd)
    disk.start()
    assert ["s"] == os.listdir(disk.snapshots)


def test_the_helper_ends_with_the_daemon_however_that_ends(mount):  # noqa: F811
    disk = mount(K64)
    children = Path(f"/proc/{disk.pid}/task/{disk.pid}/children").read_text().split()
    assert 1 == len(children)
    helper = os.pidfd_open(int(children[0]))
    disk.kill()
    assert select.select([helper], [], [], 20)[0]
    os.close(helper)


def test_kills_in_the_middle_of_creations_leave_no_hanging_mount(mount):  # noqa: F811
    disk = mount(os.urandom(SIZE))
    for round_ in range(6):
        ending = threading.Event()

        def create(round_: int = round_, ending: threading.Event = ending) -> None:
            number = 0
            with contextlib.suppress(OSError):
                while not ending.is_set():
                    disk.create(f"{round_}-{number}")
                    (disk.snapshots / f"{round_}-{number}").unlink()
                    number += 1

        threads = [threading.Thread(target=create)]
        for thread in threads:
            thread.start()
        while threads[0].is_alive() and not os.listdir(disk.state / "snapshots"):
            pass
        disk.kill()
        ending.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive(), "the mount hangs"
        disk.start()
