"""Temp storage that answers no call at all: nobody waits who needs nothing of it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.hanging import Hanging, hanging
from tests.support.mounted import Mounted
from tests.support.patched import UNHURRIED, Patched, hurry

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif("os.geteuid()", reason="needs root to unmount what hangs"),
]

MIB = 1 << 20
K64 = 1 << 16
OLD = os.urandom(4 * MIB)
PATCH = UNHURRIED + "import snapfs.daemon.daemon; snapfs.daemon.daemon.LAST_SECONDS = 2"


@pytest.fixture
def storage(tmp_path) -> Iterator[Hanging]:
    with hanging(tmp_path / "temps") as found:
        yield found


@pytest.fixture(params=["fastpath", "no_fastpath"])
def daemon(request, mount, storage, tmp_path) -> Iterator[Callable[..., tuple[Mounted, Patched]]]:
    """Mounts an image whose temp images are on that storage; gives up soon at its end."""
    started: list[Patched] = []

    def start(*options: str) -> tuple[Mounted, Patched]:
        extra = [] if request.param == "fastpath" else ["no_fastpath"]
        options = (f"temp-dir={tmp_path}/temps", "temp-reserve=0", *options, *extra)
        disk = mount(OLD, *options, start=False)
        started.append(Patched(disk, PATCH))
        return disk, started[-1]

    yield start
    for each in started:
        if each.process.returncode is None:  # the test has failed
            each.process.kill()
            each.finish()


class Write(threading.Thread):
    """A write that may take its time."""

    def __init__(self, disk: Mounted, offset: int) -> None:
        super().__init__()
        self._disk, self._offset = disk, offset
        self.error: int | None = None
        self.start()

    def run(self) -> None:
        try:
            self._disk.write(self._offset, b"n" * K64)
            self.error = 0
        except OSError as error:
            self.error = error.errno


def hang(disk: Mounted, storage: Hanging) -> None:
    """From now on storage answers nothing, and timeouts count."""
    storage.hang()
    hurry(disk, True)


def go_on(disk: Mounted, storage: Hanging) -> None:
    hurry(disk, False)
    storage.go_on()


def use_the_rest(disk: Mounted) -> None:
    """What needs nothing of the temp storage; clusters 0 to 3 were copied."""
    for number in range(100):
        offset = number % 32 * K64 + MIB
        assert OLD[offset : offset + 4096] == disk.read("active", offset, 4096)
        assert OLD[offset : offset + 4096] == disk.read("snapshots/s", offset, 4096)
    with open(disk.active, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert OLD[MIB:] == disk.read("active", MIB, 3 * MIB)
    assert ["s"] == os.listdir(disk.snapshots)
    os.statvfs(disk.mountpoint)
    assert 4 * MIB == os.stat(disk.snapshots / "s").st_size


@pytest.mark.parametrize("policy", ["break-snapshot", "break-guest-write"])
def test_only_writes_that_need_a_copy_wait(daemon, storage, policy):
    disk, process = daemon(f"on-cbw-error={policy}", "cbw-timeout=1")
    disk.create("s")
    disk.write(0, b"x" * 4 * K64)
    assert 4 * K64 == disk.temp_bytes("s")
    hang(disk, storage)
    disk.write(0, b"y" * 4 * K64)  # needs no copy
    use_the_rest(disk)
    status = disk.json("status")
    assert (4 * K64, True) == (status["temp"]["used_bytes"], status["mount"]["healthy"])
    assert status["temp"]["age_seconds"] > 0
    assert 4 * K64 == disk.temp_bytes("s")
    writers = [Write(disk, MIB - K64)]  # the kernel lets one write(2) of a file through at a time
    use_the_rest(disk)
    disk.json("list", check=False)
    for writer in writers:
        writer.join()
    lost = policy == "break-snapshot"
    assert [0 if lost else errno.ETIMEDOUT] == [writer.error for writer in writers]
    use_the_rest(disk)
    found = disk.json("show", "s", check=False)["snapshot"]
    assert ("incomplete" if lost else "ok") == found["state"]
    go_on(disk, storage)
    disk.write(3 * MIB, b"z" * K64)
    assert OLD[: 4 * K64] == disk.read("snapshots/s", 0, 4 * K64)
    assert OLD[3 * MIB :] == disk.read("snapshots/s", 3 * MIB, MIB)
    disk.stop()
    assert (0, True) == (process.finish()[0], True)


def test_an_unmount_does_not_wait_for_it_for_ever(daemon, storage):
    disk, process = daemon("cbw-timeout=1")
    disk.create("s")
    disk.write(0, b"x" * K64)
    hang(disk, storage)
    Write(disk, MIB).join()
    disk.json("status", check=False)
    done = disk.snapfs("umount", disk.mountpoint, check=False)
    assert (7, True) == (done.returncode, "gave up waiting" in done.stderr)
    status, log = process.finish()
    assert 7 == status
    assert "gave up waiting for the storage" in log
    go_on(disk, storage)
    again = Patched(disk, PATCH)
    assert "incomplete" == disk.json("show", "s", check=False)["snapshot"]["state"]
    assert OLD[:K64] == disk.read("snapshots/s", 0, K64)
    assert OLD[2 * MIB :] == disk.read("snapshots/s", 2 * MIB, 2 * MIB)
    disk.stop()
    assert 0 == again.finish()[0]


def test_a_deletion_does_not_wait_for_it_for_ever(daemon, storage):
    disk, _ = daemon("cbw-timeout=1")
    for name in "abc":
        disk.create(name)
        disk.write(0, name.encode() * K64)
    hang(disk, storage)
    for name in "abc":
        (disk.snapshots / name).unlink()
    assert [] == os.listdir(disk.snapshots)
    go_on(disk, storage)
    disk.create("d")
    disk.write(0, b"d" * K64)
    assert b"c" * K64 == disk.read("snapshots/d", 0, K64)
    disk.stop()
