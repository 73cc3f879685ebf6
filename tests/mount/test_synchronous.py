"""Writes that must be durable when they return: counted at the daemon's fdatasync."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import frozen

from snapfs.storage.linux import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from tests.support.mounted import Mounted, run
from tests.support.patched import Patched

pytestmark = pytest.mark.mount

MIB = 1 << 20
PAGE = 4096
WRITES = 20

# A byte in the file for each sync of the image, which fails while there is a file "failing".
COUNTED = """
import errno
import snapfs.storage.image as image
syncs = os.open(arguments[0] + ".syncs", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
name = arguments[0]
class Counting:
    def __getattr__(self, name):
        return getattr(os, name)
    def fdatasync(self, fd):
        if os.readlink(f"/proc/self/fd/{fd}") == name:
            if os.path.exists(name + ".failing"):
                raise OSError(errno.EDQUOT, "")
            os.fdatasync(fd)
            os.write(syncs, b"s")
image.os = Counting()
"""


@frozen
class Counted:
    disk: Mounted

    @property
    def syncs(self) -> int:
        return Path(f"{self.disk.image}.syncs").stat().st_size


@pytest.fixture
def counted(mount) -> Iterator[Counted]:
    disk = mount(MIB, start=False)
    daemon = Patched(disk, COUNTED)
    yield Counted(disk)
    disk.snapfs("umount", disk.mountpoint, check=False)
    daemon.finish()


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[tuple[int, mmap.mmap]]:
    """A descriptor, and a page that O_DIRECT takes."""
    fd = os.open(path, os.O_RDWR | flags)
    try:
        with mmap.mmap(-1, PAGE) as page:
            page.write(b"x" * PAGE)
            yield fd, page
    finally:
        os.close(fd)


@pytest.mark.parametrize("flag", [os.O_DSYNC, os.O_SYNC])
@pytest.mark.parametrize("direct", [os.O_DIRECT, 0])
def test_a_synchronous_write_is_synced_before_it_returns(counted, flag, direct):
    with opened(counted.disk.active, direct | flag) as (fd, page):
        for number in range(WRITES):
            before = counted.syncs
            assert PAGE == os.pwrite(fd, page, number * PAGE)
            assert before < counted.syncs
    assert WRITES == counted.syncs  # once each, by us or by the kernel


def test_one_write_alone_can_be_synchronous(counted):
    with opened(counted.disk.active, os.O_DIRECT) as (fd, page):
        assert PAGE == os.pwrite(fd, page, 0)
        assert 0 == counted.syncs
        assert PAGE == os.pwritev(fd, [page], PAGE, os.RWF_DSYNC)
        assert 1 == counted.syncs


def test_a_write_beyond_the_end_and_one_that_copies(counted):
    counted.disk.create("s")
    with opened(counted.disk.active, os.O_DIRECT | os.O_DSYNC) as (fd, page):
        assert PAGE == os.pwrite(fd, page, 0)
        assert PAGE == os.pwrite(fd, page, 2 * MIB)
    assert counted.syncs >= 2


@pytest.mark.parametrize("direct", [os.O_DIRECT, 0])
def test_fallocate_through_such_a_descriptor(counted, direct):
    punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    with opened(counted.disk.active, direct) as (fd, _):
        fallocate(fd, punch, 0, 2 * PAGE)
        assert 0 == counted.syncs
    with opened(counted.disk.active, direct | os.O_DSYNC) as (fd, _):
        fallocate(fd, punch, 0, 2 * PAGE)
        assert 1 == counted.syncs
        fallocate(fd, 0, 0, 2 * MIB)
        assert 2 == counted.syncs


def test_a_sync_that_fails_is_the_errno_of_the_write(counted):
    with opened(counted.disk.active, os.O_DIRECT | os.O_DSYNC) as (fd, page):
        Path(f"{counted.disk.image}.failing").touch()
        with pytest.raises(OSError) as raised:
            os.pwrite(fd, page, 0)
        Path(f"{counted.disk.image}.failing").unlink()
    assert errno.EDQUOT == raised.value.errno
    assert 7 == counted.disk.snapfs("umount", counted.disk.mountpoint, check=False).returncode


def test_fio_with_dsync(counted):
    done = run(
        "fio", "--name=w", f"--filename={counted.disk.active}", "--rw=randwrite", "--bs=4k",
        "--size=1m", "--ioengine=libaio", "--iodepth=4", "--direct=1", "--sync=dsync",
        "--number_ios=100", "--verify=crc32c",
    )  # fmt: skip
    assert "err= 0" in done.stdout
    assert counted.syncs >= 25  # of four under way one sync may serve all
