"""What the kernel's page cache has of `active`, and nobody has written to us yet."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounted import Mounted, helpers_of, run
from tests.support.patched import Patched

pytestmark = pytest.mark.mount

MIB = 1 << 20
SIZE = 16 * MIB
PLACE = 5 * MIB
WORDS = b"written just now"


def keep_dirty(disk: Mounted) -> None:
    """Let the kernel write back late, as it does for larger mounts; at once else."""
    device = os.stat(disk.mountpoint).st_dev
    bdi = Path("/sys/class/bdi", f"{os.major(device)}:{os.minor(device)}")
    with contextlib.suppress(OSError):  # not root, or an old kernel
        (bdi / "strict_limit").write_text("0")
        (bdi / "max_ratio").write_text("100")


# In a process of its own: each close(2) of a descriptor of the file writes back, and so does a
# program that we start, which gets ours and closes them.
WRITER = """
import mmap, os, sys
path, how, size, place, words = sys.argv[1:]
fd = os.open(path, os.O_RDWR)
if how == "mapping":
    mapping = mmap.mmap(fd, int(size))
    mapping[int(place) : int(place) + len(words)] = words.encode()
else:
    os.pwrite(fd, words.encode(), int(place))
print("written", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def written(disk: Mounted, how: str = "mapping") -> Iterator[None]:
    """Words in `active` that only the kernel has."""
    keep_dirty(disk)
    arguments = [str(disk.active), how, str(SIZE), str(PLACE), WORDS.decode()]
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert b"written\n" == process.stdout.readline()
        yield
        process.stdin.close()
        assert 0 == process.wait()


@contextlib.contextmanager
def opened(disk: Mounted, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(disk.active, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture(params=["mapping", "writeback_cache"])
def dirty(mount, request) -> Iterator[Mounted]:
    """A disk of zeros, with words in the page cache of its `active`."""
    for _ in range(20):  # short of memory for what is dirty, the kernel writes back at once
        disk = mount(SIZE, *(["writeback_cache"] if request.param == "writeback_cache" else []))
        with written(disk, request.param):
            if bytes(SIZE) == disk.image.read_bytes():
                yield disk
                return
    pytest.fail("the kernel keeps nothing dirty")


def test_it_is_data_to_who_seeks(dirty):
    with opened(dirty) as fd:
        assert 0 == os.lseek(fd, 0, os.SEEK_HOLE)
        assert PLACE == os.lseek(fd, 0, os.SEEK_DATA)
        with pytest.raises(OSError, match="No such device or address"):
            os.lseek(fd, PLACE + MIB, os.SEEK_DATA)


@pytest.mark.parametrize("reader", ["cp", "tar", "dd"])
def test_it_is_in_a_copy(dirty, tmp_path, reader):
    copy = tmp_path / "copy"
    if reader == "cp":
        run("cp", "--sparse=auto", dirty.active, copy)
    elif reader == "dd":
        run("dd", f"if={dirty.active}", f"of={copy}", "bs=1M", "conv=sparse")
    else:
        done = run(
            "tar", "-S", "-cf", tmp_path / "tar", "-C", dirty.mountpoint, "active", check=False
        )
        assert done.returncode in (0, 1)  # it says that the file has changed: what came in
        run("tar", "-xf", tmp_path / "tar", "-C", tmp_path)
        (tmp_path / "active").rename(copy)
    expected = bytearray(SIZE)
    expected[PLACE : PLACE + len(WORDS)] = WORDS
    assert expected == copy.read_bytes()


def test_it_is_in_map(dirty):
    extents = dirty.snapfs("map", dirty.active, "--json").stdout
    assert f'"start": {PLACE}' in extents
    assert '"data": true' in extents


def test_it_is_a_difference(mount):
    disk = mount(SIZE)
    disk.create("s")
    with written(disk):
        extents = disk.json("diff", "s")["extents"]
    assert [(PLACE, 65536)] == [(each["start"], each["length"]) for each in extents]


def test_where_nobody_can_tell_all_is_data(mount):
    disk = mount(SIZE)
    helpers = helpers_of(disk.pid)
    with written(disk), opened(disk) as fd:
        for helper in helpers:
            os.kill(helper, signal.SIGKILL)
        assert MIB == os.lseek(fd, MIB, os.SEEK_DATA)
        assert SIZE == os.lseek(fd, MIB, os.SEEK_HOLE)
        with pytest.raises(OSError, match="No such device or address"):
            os.lseek(fd, SIZE, os.SEEK_DATA)
    with opened(disk) as fd:  # nobody can write: what is there counts
        assert PLACE == os.lseek(fd, 0, os.SEEK_DATA)


COUNTED = """
from snapfs.fuse.outsider import Outsider
call = Outsider.call
async def counting(self, what, name=""):
    with open(arguments[0] + ".calls", "a") as file:
        print(what, file=file)
    return await call(self, what, name)
Outsider.call = counting
"""


def test_where_nothing_can_be_dirty_nobody_is_asked(mount):
    disk = mount(SIZE, start=False)
    daemon = Patched(disk, COUNTED)
    calls = disk.image.with_name(disk.image.name + ".calls")
    try:
        before = calls.read_text()
        for flags in (os.O_RDONLY, os.O_RDWR | os.O_DIRECT):
            with opened(disk, flags) as fd, pytest.raises(OSError, match="No such device"):
                os.lseek(fd, 0, os.SEEK_DATA)
        assert before == calls.read_text()
        with written(disk), opened(disk) as fd:
            assert PLACE == os.lseek(fd, 0, os.SEEK_DATA)
        assert "write_back" in calls.read_text()
    finally:
        disk.stop()
        daemon.finish()
