"""Mapped files whose pages cannot be had: told, not the end of the process."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from snapfs.storage.mapping import Mapping, counter, failures, map_file

PAGE = mmap.PAGESIZE


@pytest.fixture
def file(tmp_path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_a_mapping_is_the_file_and_takes_no_descriptor(file):
    os.truncate(file, 3 * PAGE)
    before = os.listdir("/proc/self/fd")
    mapping = map_file(file, 3 * PAGE - 5)
    assert len(before) == len(os.listdir("/proc/self/fd"))
    assert 3 * PAGE - 5 == len(mapping) == memoryview(mapping).nbytes
    mapping[PAGE : PAGE + 3] = b"abc"
    mapping[0] = 7
    assert (7, b"abc", 0) == (mapping[0], mapping[PAGE : PAGE + 3], mapping[-1])
    assert b"abc" == os.pread(file, 3, PAGE)
    assert not mapping.failed
    mapping.close()


def test_a_page_that_was_touched_stays_in_memory(file):
    """Else one that could not be stored might be read anew before anybody has asked."""
    os.truncate(file, 2 * PAGE)
    mapping = Mapping(file, 2 * PAGE)
    mapping[0] = 1
    with memoryview(mapping) as view:
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    of_it = Path("/proc/self/smaps").read_text().partition(f"{address:x}-")[2]
    locked = next(line for line in of_it.splitlines() if line.startswith("Locked:"))
    assert ["4", "kB"] == locked.split()[1:], "of the page that was touched, and of no other"
    mapping.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="who may lock little has little locked")
def test_what_is_kept_in_memory_is_bounded_and_the_newest_ones_are(tmp_path):
    """A thousand snapshots of 1 TiB have 4 GB of bitmaps."""
    fd = os.open(tmp_path / "sparse", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, size := 16 << 20)
    made = [Mapping(fd, size) for _ in range(24)]
    found = [_is_locked(each) for each in made]
    most = min(256 << 20, os.sysconf("SC_PHYS_PAGES") * PAGE // 16)
    assert not found[0]
    assert found == sorted(found)
    assert most - 2 * size <= size * sum(found) <= most
    for each in made[20:]:
        each.close()
    left = [*made[:20], Mapping(fd, size)]
    assert [*found[:20], True] == [_is_locked(each) for each in left], "there is room again"
    for each in left:
        each.close()
    os.close(fd)


def _is_locked(mapping) -> bool:
    with memoryview(mapping) as view:
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-", line):
            first, last = (int(each, 16) for each in line.split()[0].split("-"))
        elif line.startswith("VmFlags:") and first <= address < last:
            return "lo" in line.split()
    raise AssertionError


def test_a_closed_mapping_has_nothing_and_one_in_use_cannot_be_closed(file):
    os.truncate(file, PAGE)
    mapping = map_file(file, PAGE)
    view = memoryview(mapping)
    with pytest.raises(BufferError, match="in use"):
        mapping.close()
    view.release()
    mapping.close()
    mapping.close()
    assert 0 == len(mapping)
    with pytest.raises(BufferError, match="closed"):
        memoryview(mapping)


def test_an_empty_mapping_is_refused_and_so_is_what_cannot_be_mapped(file):
    with pytest.raises(ValueError, match="at least one byte"):
        Mapping(file, 0)
    read_only = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    with pytest.raises(PermissionError):
        Mapping(read_only, PAGE)
    os.close(read_only)


def test_a_page_that_cannot_be_read_is_zeros_and_only_its_mapping_has_failed(file, tmp_path):
    os.pwrite(file, b"x" * 2 * PAGE, 0)
    mapping, other = map_file(file, 2 * PAGE), map_file(file, PAGE)
    before = failures()
    os.truncate(file, PAGE)
    assert (b"x", b"\0") == (mapping[:1], mapping[PAGE : PAGE + 1])
    assert (True, False) == (mapping.failed, other.failed)
    assert before + 1 == failures() == int.from_bytes(counter, sys.byteorder)
    mapping[PAGE : 2 * PAGE] = b"y" * PAGE  # goes on in memory
    assert b"y" == mapping[2 * PAGE - 1 :]
    assert before + 1 == failures()
    assert PAGE == os.fstat(file).st_size
    mapping.close()
    other.close()


def test_two_threads_that_meet_at_a_page_that_fails_lose_nothing(file):
    pages = 300
    os.truncate(file, pages * PAGE)
    mapping = map_file(file, pages * PAGE)
    os.truncate(file, 0)
    before = failures()
    start = threading.Barrier(2)

    def write(where: int) -> None:
        start.wait()
        for page in range(pages):
            mapping[page * PAGE + where] = 1

    threads = [threading.Thread(target=write, args=(where,)) for where in (5, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [2] * pages == [sum(mapping[n * PAGE : n * PAGE + 16]) for n in range(pages)]
    assert before + pages == failures()
    mapping.close()


def test_a_fault_that_is_not_ours_still_ends_the_process(tmp_path):
    program = """
        import mmap, os, resource, sys
        from snapfs.storage.mapping import map_file
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
        os.truncate(fd, 8192)
        ours, foreign = map_file(fd, 8192), mmap.mmap(fd, 8192)
        os.truncate(fd, 0)
        print(ours[0], ours.failed, flush=True)
        print(foreign[0])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), tmp_path / "file"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("0 True\n", -signal.SIGBUS) == (done.stdout, done.returncode), done.stderr


def test_a_mapping_that_is_gone_takes_its_failures_along(file):
    """A later one at the same address must be noticed anew."""
    for _ in range(3):
        os.truncate(file, PAGE)
        mapping = map_file(file, PAGE)
        os.truncate(file, 0)
        before = failures()
        assert (0, before + 1, True) == (mapping[0], failures(), mapping.failed)
        mapping.close()
