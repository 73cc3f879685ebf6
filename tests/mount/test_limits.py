"""A daemon that runs out of file descriptors: it refuses in words, answers, and goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from snapfs.state.layerstore import DESCRIPTORS
from tests.support.mounted import K64, MIB, PATIENCE, SNAPFS, Mounted, run
from tests.support.patched import Patched
from tests.support.stores import make_many

# No thread can be started while there is the file IMAGE.exhausted, and idle ones end at once.
NO_THREADS = """
import threading
from trio._core import _thread_cache
from snapfs.daemon import daemon
daemon.SYNC_SECONDS = 0.02
_thread_cache.IDLE_TIMEOUT = 0.01
start = threading.Thread.start
def refused(thread):
    if os.path.exists(arguments[0] + ".exhausted"):
        reached()
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = refused
"""

OLD, NEW = b"o" * K64, b"n" * K64


def descriptors(disk: Mounted) -> int:
    return len(os.listdir(f"/proc/{disk.pid}/fd"))


@contextmanager
def limited(disk: Mounted, more: int) -> Iterator[None]:
    """The daemon may have so many descriptors more than it has now."""
    assert disk.pid is not None
    before = resource.prlimit(disk.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(disk.pid, resource.RLIMIT_NOFILE, (descriptors(disk) + more, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            resource.prlimit(disk.pid, resource.RLIMIT_NOFILE, before)


def made_up(disk: Mounted, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state directory with so many snapshots, which need not be durable."""
    with monkeypatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda _fd: None)
        trio.run(make_many, disk.image, count)


def connect(disk: Mounted) -> socket.socket:
    """A client of the control socket that says nothing yet."""
    client = socket.socket(socket.AF_UNIX)
    with open_directory(disk.state) as fd:
        client.connect(f"/proc/self/fd/{fd}/control.sock")
    return client


@contextmanager
def open_directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def test_the_daemon_raises_its_limit(mount: Callable[..., Mounted]):
    disk = mount(MIB, start=False)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    started = subprocess.run(
        ["bash", "-c", 'ulimit -Sn 200; exec "$@"', "-", *SNAPFS, "mount",
         str(disk.image), str(disk.mountpoint)],
        check=False, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert (0, "") == (started.returncode, started.stderr)
    disk.pid = disk.json("status")["mount"]["pid"]
    assert (hard, hard) == resource.prlimit(disk.pid, resource.RLIMIT_NOFILE)


@pytest.mark.parametrize("options", [(), ("durability=power",)])
def test_a_snapshot_takes_no_more_descriptors_than_are_counted_on(
    mount: Callable[..., Mounted], options
):
    disk = mount(MIB, *options)
    disk.write(0, OLD)
    disk.create("first")
    disk.write(0, NEW)  # what copies need is open from now on
    before = descriptors(disk)
    for number in range(5):
        disk.create(str(number))
    assert before + 5 * DESCRIPTORS == descriptors(disk)


def test_without_a_descriptor_everything_but_more_snapshots_goes_on(
    mount: Callable[..., Mounted],
):
    disk = mount(OLD * 16)
    disk.create("a")
    disk.create("b")
    with limited(disk, 0):
        clients = [connect(disk) for _ in range(3)]
        for _ in range(5):
            assert "a" == disk.json("status")["snapshots"][0]["name"]
        disk.write(K64, NEW)  # a copy
        assert NEW + OLD == disk.read("active", K64, 2 * K64)
        assert OLD * 2 == disk.read("snapshots/a", K64, 2 * K64)
        with pytest.raises(OSError, match="Too many open files in system") as refused:
            disk.create("c")
        assert errno.ENFILE == refused.value.errno
        done = disk.snapfs("create", disk.mountpoint, "c", check=False)
        assert (1, True) == (done.returncode, "LimitNOFILE=" in done.stderr)
        done = disk.snapfs("bitmap", "add", disk.mountpoint, "c", check=False)
        assert (1, True) == (done.returncode, "LimitNOFILE=" in done.stderr)
        disk.snapfs("delete", disk.mountpoint, "a")
        assert ["b"] == os.listdir(disk.snapshots)
        # More than are set aside: those that come last are told why they are refused.
        clients += [connect(disk) for _ in range(12)]
        assert b"LimitReached" in clients[-1].recv(4096)
        done = disk.snapfs("list", disk.mountpoint, check=False)
        assert done.returncode == 0 or "file descriptors of the daemon" in done.stderr
        for client in clients:
            client.close()
        disk.write(3 * K64, NEW)
    disk.create("c")
    assert OLD * 2 == disk.read("snapshots/b", 0, 2 * K64)[:K64] + OLD
    disk.stop()
    disk.start()
    assert ["b", "c"] == sorted(os.listdir(disk.snapshots))
    assert [] == [each for each in disk.json("status")["snapshots"] if each["state"] != "ok"]
    assert OLD == disk.read("snapshots/b", 3 * K64, K64)


def test_without_a_descriptor_the_mount_ends_in_order(mount: Callable[..., Mounted]):
    disk = mount(OLD * 16)
    disk.create("a")
    disk.write(0, NEW)
    with limited(disk, 0):
        disk.snapfs("umount", disk.mountpoint)
    assert '"clean": true' in (disk.state / "manifest.json").read_text()


def test_more_snapshots_than_the_usual_limit(mount: Callable[..., Mounted], monkeypatch):
    """With a lower limit, which takes less time; 5,000 are in scripts/bench."""
    count = 400
    disk = mount(OLD * 2, start=False)
    made_up(disk, count, monkeypatch)
    started = run(
        "bash", "-c", 'ulimit -Sn 256; exec "$@"', "-", *SNAPFS, "mount",
        disk.image, disk.mountpoint,
    )  # fmt: skip
    assert "" == started.stderr
    disk.pid = disk.json("status")["mount"]["pid"]
    assert descriptors(disk) < count * DESCRIPTORS + 64
    assert count == len(os.listdir(disk.snapshots))
    disk.write(0, NEW)
    for name in ("s0", f"s{count - 1}"):
        assert OLD * 2 == disk.read(f"snapshots/{name}", 0, 2 * K64)
    disk.create("newest")
    disk.snapfs("delete", disk.mountpoint, "s0", f"s{count // 2}", f"s{count - 1}")
    assert OLD == disk.read("snapshots/s1", 0, K64)
    assert NEW == disk.read("snapshots/newest", 0, K64)


def test_a_mount_with_more_snapshots_than_it_can_have_is_refused(
    mount: Callable[..., Mounted], monkeypatch
):
    disk = mount(OLD * 2, start=False)
    made_up(disk, 120, monkeypatch)
    before = (disk.state / "manifest.json").read_bytes()
    refused = subprocess.run(
        ["bash", "-c", 'ulimit -n 300; exec "$@"', "-", *SNAPFS, "mount",
         str(disk.image), str(disk.mountpoint)],
        check=False, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert 1 == refused.returncode
    for word in ("120 snapshots", "LimitNOFILE=", "ulimit -n", "fs.nr_open"):
        assert word in refused.stderr
    assert before == (disk.state / "manifest.json").read_bytes()
    disk.start()
    assert 120 == len(os.listdir(disk.snapshots))


def test_what_blocks_waits_for_a_thread(mount):
    """A limit of processes, a cgroup's for one, is reached by whoever else is in it."""
    disk = mount(OLD, "durability=power", start=False)
    daemon = Patched(disk, NO_THREADS)
    exhausted = Path(f"{disk.image}.exhausted")
    exhausted.touch()
    daemon.wait_reached()  # the sign of life
    synced = subprocess.Popen(
        ["dd", f"of={disk.active}", "conv=notrunc,fsync"], stdin=subprocess.PIPE
    )
    synced.stdin.write(NEW)
    exhausted.unlink()
    daemon.go()
    synced.communicate()
    assert 0 == synced.returncode
    assert disk.json("status")["mount"]["healthy"]
    disk.snapfs("umount", disk.mountpoint)
    assert 0 == daemon.finish()[0]
    assert NEW == disk.image.read_bytes()


def test_the_size_of_files_that_a_shell_may_make_is_not_that_of_the_image(mount):
    disk = mount(MIB, start=False)
    soft = 'ulimit -S -f 64; exec "$@"'  # KiB
    run("bash", "-c", soft, "bash", *SNAPFS, "mount", disk.image, disk.mountpoint)
    disk.create("s")
    disk.write(MIB - K64, NEW)
    disk.stop()
    hard = 'ulimit -f 64; exec "$@"'
    done = run(
        "bash", "-c", hard, "bash", *SNAPFS, "mount", disk.image, disk.mountpoint, check=False
    )
    assert 1 == done.returncode
    assert "files may have 65536 at most here: raise the limit" in done.stderr
    disk.start()
    assert NEW == disk.read("active", MIB - K64, K64)
