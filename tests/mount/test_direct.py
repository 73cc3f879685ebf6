"""`active` opened with O_DIRECT: writes side by side, and what the page cache has of it."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Iterator

import pytest

from tests.support.mounted import Mounted
from tests.support.patched import SLOW, Patched

pytestmark = pytest.mark.mount

MIB = 1 << 20
K64 = 1 << 16


@contextlib.contextmanager
def direct(disk: Mounted) -> Iterator[int]:
    fd = os.open(disk.active, os.O_RDWR | os.O_DIRECT)
    try:
        yield fd
    finally:
        os.close(fd)


def write(fd: int, offset: int, letter: bytes) -> None:
    """64 KiB, from memory that O_DIRECT takes."""
    with mmap.mmap(-1, K64) as buffer:
        buffer.write(letter * K64)
        assert K64 == os.pwrite(fd, buffer, offset)


def test_a_write_that_waits_for_a_copy_holds_up_no_other(mount):
    moment = os.urandom(4 * MIB)
    disk = mount(moment, "no_fastpath", "cbw-timeout=0", start=False)
    daemon = Patched(disk, SLOW)
    try:
        snapshot = disk.create("s")
        with direct(disk) as fd, direct(disk) as other:
            waiting = threading.Thread(target=write, args=(fd, 2 * MIB, b"x"))
            waiting.start()
            daemon.wait_reached()
            for number in range(16):
                write(other, number * K64, b"y")
            assert waiting.is_alive()
            daemon.go()
            waiting.join()
        assert moment == snapshot.read_bytes()
        after = b"y" * MIB + moment[MIB : 2 * MIB] + b"x" * K64 + moment[2 * MIB + K64 :]
        assert after == disk.active.read_bytes()
    finally:
        disk.stop()
        daemon.finish()


def test_a_buffered_reader_beside_a_direct_writer(mount):
    disk = mount(b"0" * MIB)
    with direct(disk) as fd, open(disk.active, "rb", buffering=0) as reader:
        for letter in (b"1", b"2", b"3"):
            write(fd, K64, letter)
            assert letter * K64 == os.pread(reader.fileno(), K64, K64)
    assert b"3" * K64 == disk.read("active", K64, K64)


def test_a_direct_writer_beside_a_buffered_reader(mount):
    disk = mount(b"0" * MIB)
    with open(disk.active, "rb", buffering=0) as reader:
        assert b"0" * MIB == os.pread(reader.fileno(), MIB, 0)
        with direct(disk) as fd:
            for letter in (b"1", b"2", b"3"):
                write(fd, K64, letter)
                assert letter * K64 == os.pread(reader.fileno(), K64, K64)


def test_one_after_the_other(mount):
    disk = mount(b"0" * MIB)
    for letter in (b"1", b"2", b"3"):
        with direct(disk) as fd:
            write(fd, K64, letter)
        assert letter * K64 == disk.read("active", K64, K64)
        disk.write(2 * K64, letter * K64)
        with direct(disk) as fd, mmap.mmap(-1, K64) as buffer:
            assert K64 == os.preadv(fd, [buffer], 2 * K64)
            assert letter * K64 == buffer[:]
    assert b"0" * K64 + b"3" * 2 * K64 + b"0" * (MIB - 3 * K64) == disk.active.read_bytes()


def test_who_bypasses_the_page_cache_cannot_share_it(mount):
    disk = mount(b"0" * MIB)
    with direct(disk) as fd:
        with pytest.raises(OSError) as caught:
            mmap.mmap(fd, MIB)
        assert errno.ENODEV == caught.value.errno
        with mmap.mmap(fd, MIB, mmap.MAP_PRIVATE) as mapping:
            assert b"0" * MIB == mapping[:]
    with open(disk.active, "r+b") as file, mmap.mmap(file.fileno(), MIB) as mapping:
        assert b"0" * MIB == mapping[:]


def test_direct_writes_that_make_the_image_grow(mount):
    disk = mount(b"0" * K64)
    with direct(disk) as fd:
        writers = [
            threading.Thread(target=write, args=(fd, number * K64, b"%d" % number))
            for number in range(1, 9)
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
    expected = b"".join(b"%d" % number * K64 for number in range(9))
    assert expected == disk.active.read_bytes()
    disk.stop()
    assert expected == disk.image.read_bytes()
