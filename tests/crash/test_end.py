"""The end of a daemon that is busy: nothing is forgotten, nobody hangs."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterator

import pytest

from snapfs.storage.linux import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from tests.support.mounted import PATIENCE, Mounted, helpers_of
from tests.support.patched import Patched

pytestmark = pytest.mark.mount

K64 = 1 << 16
SIZE = 64 * K64

# Punches of the image wait.
HELD = """
import snapfs.storage.image as image
punch = image._punch
def held(*arguments):
    reached()
    punch(*arguments)
image._punch = held
"""


@pytest.fixture
def held(mount) -> Iterator[tuple[Mounted, Patched]]:
    disk = mount(os.urandom(SIZE), start=False)
    daemon = Patched(disk, HELD)
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
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert results[0] != 0
    with contextlib.suppress(OSError):
        os.close(fd)
    disk.start()
    assert ["s"] == os.listdir(disk.snapshots)


def test_the_helper_ends_with_the_daemon_however_that_ends(mount):
    disk = mount(K64)
    [found] = helpers_of(disk.pid)
    helper = os.pidfd_open(found)
    disk.kill()
    assert select.select([helper], [], [], PATIENCE)[0]
    os.close(helper)


def test_kills_in_the_middle_of_creations_leave_no_hanging_mount(mount):
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
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the mount hangs"
        disk.start()
