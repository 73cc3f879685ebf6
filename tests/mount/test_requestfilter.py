"""The request filter with a real kernel: a file system of one file, run as a program."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import sanitized
from tests.support.filtered import INO, MIB, SIZE, Mount, wait_until

pytestmark = pytest.mark.mount

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Mount]:
    """A mount that the test ends itself."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/fuse")
    mount = Mount(tmp_path / "mnt")
    try:
        yield mount
    finally:
        mount.kill()


@pytest.fixture(params=["filter", "libfuse"])
def mount(running: Mount, request: pytest.FixtureRequest) -> Iterator[Mount]:
    """A mount whose requests the filter reads, or libfuse; it must end cleanly.

    The kernel sends a RELEASE after close(2) has returned; one that meets the unmount is
    what pyfuse3 and libfuse complain about, so it waits for them.
    """
    assert running("attached") is True
    running("configure", request.param == "filter")
    descriptors = running("descriptors")
    yield running
    assert running("descriptors") - descriptors <= 2  # libfuse's splice pipe
    wait_until(lambda: running("opened") == 0)
    result, stderr = running.unmount()
    assert ([0, 0], "") == (result["outstanding"], stderr)


def fails(call: Callable[..., object], *args: object) -> None:
    with pytest.raises(OSError):
        call(*args)


def events(mount: Mount, kind: str) -> list[list[Any]]:
    return [event for event in mount("events") if event[0] == kind]


def fallocate(mount: Mount, *args: str) -> str:
    """Run fallocate(1); its stderr, empty if it succeeded."""
    result = subprocess.run(
        ["fallocate", *args, mount.file],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert (result.returncode == 0) == (result.stderr == "")
    return result.stderr


VALUE_ERROR = ["refused", ["ValueError", None]]


@pytest.mark.parametrize(
    ("option", "mode"), [("-p", PUNCH_HOLE | KEEP_SIZE), ("-z", ZERO_RANGE), ("-n", KEEP_SIZE)]
)
def test_fallocate_arrives_and_its_errno_comes_back(mount: Mount, option: str, mode: int) -> None:
    assert "" == fallocate(mount, option, "-o", "65536", "-l", "12345")
    seen = mount("events")
    assert [["fallocate", INO, 77, mode, 65536, 12345], *[VALUE_ERROR] * 4] == [
        event for event in seen if event[0] in {"fallocate", "refused"}
    ]
    for number in (errno.EACCES, errno.ENOSPC):
        mount("set", {"errno": number})
        assert os.strerror(number) in fallocate(mount, option, "-o", "0", "-l", "4096")
    assert 3 == mount("statistics")["fallocates"]


def test_large_offsets_arrive(mount: Mount) -> None:
    assert "" == fallocate(mount, "-p", "-o", str(2**40 + 1), "-l", str(2**41 + 1))
    assert [["fallocate", INO, 77, PUNCH_HOLE | KEEP_SIZE, 2**40 + 1, 2**41 + 1]] == events(
        mount, "fallocate"
    )


def test_lseek(mount: Mount) -> None:
    with mount.open() as fd:
        assert 4096 + 5 == os.lseek(fd, 5, os.SEEK_DATA)
        assert 4096 + 6 == os.lseek(fd, 6, os.SEEK_HOLE)
        assert [
            ["lseek", INO, 77, 5, os.SEEK_DATA],
            *[VALUE_ERROR] * 3,
            ["lseek", INO, 77, 6, os.SEEK_HOLE],
            *[VALUE_ERROR] * 3,
        ] == mount("events")
        mount("set", {"errno": errno.ENXIO})
        with pytest.raises(OSError) as caught:
            os.lseek(fd, 0, os.SEEK_DATA)
        assert errno.ENXIO == caught.value.errno


def test_without_handlers_nothing_is_turned_off_for_good(mount: Mount) -> None:
    mount("handlers", False)
    for _ in range(2):
        assert "mode is unsupported" in fallocate(mount, "-p", "-o", "0", "-l", "4096")
        with mount.open() as fd, pytest.raises(OSError) as caught:
            os.lseek(fd, 0, os.SEEK_DATA)
        assert errno.EINVAL == caught.value.errno
    mount("handlers", True)
    assert "" == fallocate(mount, "-p", "-o", "0", "-l", "4096")
    with mount.open() as fd:
        assert 4096 == os.lseek(fd, 0, os.SEEK_DATA)


def test_a_handler_that_raises_gives_eio_once(running: Mount) -> None:
    running("set", {"raise": "before"})
    assert "Input/output error" in fallocate(running, "-p", "-o", "0", "-l", "4096")
    running("set", {"raise": "after"})
    assert "" == fallocate(running, "-p", "-o", "0", "-l", "4096")
    result, stderr = running.unmount()
    assert [0, 0] == result["outstanding"]
    assert 1 == stderr.count("LookupError: before the reply")
    assert 1 == stderr.count("LookupError: after the reply")


def test_requests_are_answered_in_any_order(mount: Mount) -> None:
    """More of them than the table first has room for."""
    count = 200
    mount("set", {"hold": True})
    found: list[int] = []

    def seek(fd: int) -> None:
        found.append(os.lseek(fd, 0, os.SEEK_DATA))

    with contextlib.ExitStack() as stack:
        # a file each: the kernel asks for one lseek of an inode at a time
        fds = [stack.enter_context(mount.open(name=f"file{n}")) for n in range(count)]
        threads = [threading.Thread(target=seek, args=(fd,)) for fd in fds]
        for thread in threads:
            thread.start()
        wait_until(lambda: mount("statistics")["outstanding"] == count)
        mount("answer", [*range(0, count, 2), *range(1, count, 2)])
        for thread in threads:
            thread.join()
    assert list(range(count)) == sorted(found)
    assert 0 == mount("statistics")["outstanding"]


def test_interrupts_are_refused_and_nobody_keeps_them(mount: Mount) -> None:
    """One that libfuse saw and did not know the request of stayed in its list for ever."""
    count = 50
    mount("set", {"hold": True})
    found: list[int] = []

    def seek(fd: int) -> None:
        found.append(os.lseek(fd, 0, os.SEEK_DATA))

    def start(fd: int) -> threading.Thread:
        thread = threading.Thread(target=seek, args=(fd,))
        thread.start()
        return thread

    def interrupt(thread: threading.Thread) -> None:
        assert thread.ident is not None
        signal.pthread_kill(thread.ident, signal.SIGUSR1)

    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with contextlib.ExitStack() as stack:
            fds = [stack.enter_context(mount.open(name=f"file{n}")) for n in range(count)]
            threads = [start(fds[0])]
            wait_until(lambda: mount("statistics")["outstanding"] == 1)
            interrupt(threads[0])
            wait_until(lambda: mount("statistics")["interrupts"] == 1)
            threads += [start(fd) for fd in fds[1:]]
            wait_until(lambda: mount("statistics")["outstanding"] == count)
            for thread in threads[1:]:
                interrupt(thread)
            mount("answer", list(range(count)))
            for thread in threads:
                thread.join()
        interrupts = mount("statistics")["interrupts"]
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert list(range(count)) == sorted(found)
    assert 1 == interrupts  # from then on the kernel sends none


def aligned(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size)


def test_direct_read_tells_direct_from_buffered(
    mount: Mount, request: pytest.FixtureRequest
) -> None:
    filtered = "filter" in request.node.name
    with mount.open(os.O_RDONLY | os.O_DIRECT) as fd, aligned(65536) as buffer:
        assert 65536 == os.preadv(fd, [buffer], MIB)
        assert buffer[:].hex() == mount("peek", MIB, 65536)
    assert [["read", MIB, 65536, filtered]] == events(mount, "read")
    with mount.open(os.O_RDONLY) as fd:
        os.pread(fd, 100, 0)
    with mount.open(os.O_RDONLY) as fd, mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as mapped:
        mapped[3 * MIB]
    seen = events(mount, "read")
    assert len(seen) >= 2
    assert {False} == {direct for *_, direct in seen}
    if filtered:
        counters = mount("statistics")
        assert (1, 1 + len(seen)) == (counters["direct_reads"], counters["reads"])


def test_large_writes_and_reads_arrive_whole(mount: Mount) -> None:
    text = os.urandom(2 * MIB)
    with mount.open() as fd:
        assert MIB == os.pwrite(fd, text[:MIB], MIB)
        assert text[:MIB] == os.pread(fd, MIB, MIB)
    with mount.open(os.O_RDWR | os.O_DIRECT) as fd, aligned(2 * MIB) as buffer:
        buffer[:] = text
        assert 2 * MIB == os.pwrite(fd, buffer, MIB)
        buffer[:] = bytes(2 * MIB)
        assert 2 * MIB == os.preadv(fd, [buffer], MIB)
        assert text == buffer[:]
    assert text.hex() == mount("peek", MIB, 2 * MIB)
    halves = [["write", offset, MIB // 2] for offset in range(MIB, 3 * MIB, MIB // 2)]
    assert sorted(halves[:2] + halves) == sorted(events(mount, "write"))


def test_requests_of_all_sizes_one_after_another(mount: Mount) -> None:
    """The buffer goes back and forth between the filter and several workers."""
    expected = bytearray.fromhex(mount("peek", 0, SIZE))

    def rewrite(start: int) -> None:
        with mount.open() as fd:
            for step, size in enumerate([1, 4096, 100_000, MIB - 1, 7, 300_000, 4095] * 5):
                text = bytes([start + step]) * size
                offset = start * MIB + step
                length = min(size, MIB - step)
                expected[offset : offset + length] = text[:length]
                assert length == os.pwrite(fd, text[:length], offset)
                assert text[:length] == os.pread(fd, length, offset)

    threads = [threading.Thread(target=rewrite, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert expected.hex() == mount("peek", 0, SIZE)


def test_switching_between_filter_and_libfuse(running: Mount) -> None:
    with running.open() as fd:
        for step in range(20):
            running("configure", step % 3 == 0)
            text = os.urandom(MIB >> (step % 5))
            assert len(text) == os.pwrite(fd, text, 0)
            os.stat(running.file)
            assert text.hex() == running("peek", 0, len(text))
    assert "" == running.unmount()[1]


def test_invalidate_range_drops_just_those_pages(mount: Mount) -> None:
    with mount.open(os.O_RDONLY) as fd:
        before = os.pread(fd, SIZE, 0)
        for offset in (0, 8192, 12288):
            mount("poke", offset, "changed!")
        mount("set", {"mtime": 10**18})  # an mtime of its own accord drops nothing
        os.stat(mount.file)
        assert before == os.pread(fd, SIZE, 0)
        mount("events")
        assert mount("invalidate", INO, 8192 + 100, 1) is None
        after = os.pread(fd, SIZE, 0)
    assert before[:8192] == after[:8192]
    assert b"changed!" == after[8192:8200]
    assert before[12288:] == after[12288:]
    assert mount("invalidate", 4711, 0, 1) is None  # an inode the kernel does not know
    assert 2 == mount("statistics")["invalidations"]


def test_the_end_of_the_session(running: Mount) -> None:
    running("set", {"hold": True})
    with running.open(aborted=True) as fd:
        seeker = threading.Thread(target=fails, args=(os.lseek, fd, 0, os.SEEK_DATA))
        seeker.start()
        wait_until(lambda: running("statistics")["outstanding"] == 1)
        running("terminate")
        result, stderr = running.finish()
        seeker.join()
    assert "" == stderr
    assert {
        "outstanding": [1, 0],
        "attached": False,
        "invalidate": ["OSError", errno.ENODEV],
        "late_reply": [["ValueError", None]],
    } == result


@pytest.mark.parametrize("filtered", [True, False])
def test_unmounting_while_requests_are_queued(running: Mount, filtered: bool) -> None:
    """Reading one of them then fails with ECONNABORTED now and then."""
    running("configure", filtered)
    with contextlib.ExitStack() as stack:
        for number in range(500):
            stack.enter_context(running.open(name=f"file{number}"))
    assert running.unmount()[0]["attached"] is False  # and it ended with 0


@pytest.mark.parametrize("filtered", [True, False])
def test_an_aborted_connection_does_not_spin(running: Mount, filtered: bool) -> None:
    """A handler outlives the connection; the workers must not try again and again."""
    running("configure", filtered)
    device = os.minor(os.stat(running.mountpoint).st_dev)
    abort = Path(f"/sys/fs/fuse/connections/{device}/abort")
    if not abort.exists() and os.geteuid() != 0:
        pytest.skip("needs /sys/fs/fuse/connections or root")
    running("set", {"hold": True})
    with running.open(os.O_RDONLY, aborted=True) as fd:
        reader = threading.Thread(target=fails, args=(os.pread, fd, 1, 0))
        reader.start()
        wait_until(lambda: bool(events(running, "read")))
        if abort.exists():
            abort.write_text("1")
        else:  # aborts, and then fails, since the file is open
            subprocess.run(["umount", "-f", running.mountpoint], check=False, capture_output=True)
        reader.join()
    received, cpu = running("statistics")["received"], running("cpu")
    time.sleep(0.5)  # what is measured is that nothing happens
    assert running("cpu") - cpu < 0.1
    assert running("statistics")["received"] == received
    running("free")
    assert running.finish()[0]["outstanding"] == [0, 0]


@pytest.mark.slow
@pytest.mark.xdist_group("sanitizers")
def test_under_sanitizers(built: Path, tmp_path: Path) -> None:
    """An address and undefined-behaviour sanitizer build does all of it without a report."""
    mount = Mount(tmp_path / "mnt", sanitized.environment(built))
    try:
        for filtered in (True, False, True):
            mount("configure", filtered)
            assert "" == fallocate(mount, "-p", "-o", "65536", "-l", "65536")
            with mount.open(os.O_RDWR | os.O_DIRECT) as fd, aligned(MIB) as buffer:
                assert 4096 == os.lseek(fd, 0, os.SEEK_DATA)
                assert MIB == os.pwrite(fd, buffer, 0)
                assert MIB == os.preadv(fd, [buffer], 0)
            assert mount("invalidate", INO, 0, SIZE) is None
        mount("set", {"hold": True})
        with mount.open(aborted=True) as fd:
            seeker = threading.Thread(target=fails, args=(os.lseek, fd, 0, os.SEEK_DATA))
            seeker.start()
            wait_until(lambda: mount("statistics")["outstanding"] == 1)
            mount("terminate")
            assert "" == mount.finish()[1]
            seeker.join()
    finally:
        mount.kill()
