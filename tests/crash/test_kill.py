"""kill -9 loses nothing; an image that somebody else wrote is not taken for ours."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import random
import select
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.mounted import PATIENCE, run
from tests.support.writing import killed_while_writing

pytestmark = pytest.mark.mount

K64 = 1 << 16
SIZE = 64 * K64


def test_after_a_kill_everything_is_there(mount):
    disk = mount(os.urandom(SIZE))
    moments = {}
    for name in ("a", "b"):
        moments[name] = disk.active.read_bytes()
        disk.create(name)
        disk.write(K64 // 2, os.urandom(5 * K64))
    run("fallocate", "-p", "-o", "0", "-l", str(K64), disk.snapshots / "a")
    os.rename(disk.snapshots / "b", disk.snapshots / "c")
    active = disk.active.read_bytes()
    used = {name: disk.temp_bytes(name) for name in ("a", "c")}
    disk.kill()
    with pytest.raises(OSError, match="not connected"):
        os.listdir(disk.mountpoint)
    disk.start()  # cleans the dead mount away
    assert active == disk.active.read_bytes()
    assert moments["b"] == (disk.snapshots / "c").read_bytes()
    assert moments["a"][K64:] == disk.read("snapshots/a", K64, SIZE)
    with pytest.raises(PermissionError):
        disk.read("snapshots/a", 0, 4096)
    assert used == {name: disk.temp_bytes(name) for name in ("a", "c")}


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_any_moment_under_load(mount, seed):
    """Every write that returned is there, every snapshot is exact."""
    chance = random.Random(seed)
    content = bytearray(os.urandom(SIZE))
    disk = mount(bytes(content))
    moments: dict[str, bytes] = {}
    for round_ in range(4):
        name = f"s{round_}"
        moments[name] = bytes(content)
        disk.create(name)
        if round_ == 2:
            (disk.snapshots / "s1").unlink()
            del moments["s1"]
        uncertain: list[tuple[int, bytes]] = []

        def write(fd: int, uncertain=uncertain) -> None:
            offset = chance.randrange(SIZE - 3 * K64)
            data = chance.randbytes(chance.choice((512, 4096, 2 * K64)))
            while data:  # a write that meets the end of the mount may be short
                uncertain[:] = [(offset, data)]
                count = os.pwrite(fd, data, offset)
                content[offset : offset + count] = data[:count]
                uncertain.clear()
                offset, data = offset + count, data[count:]

        killed_while_writing(disk, chance.randrange(3, 60), write)
        found = disk.active.read_bytes()
        for offset, data in uncertain:  # it had not returned: old or new, byte by byte
            old = content[offset : offset + len(data)]
            now = found[offset : offset + len(data)]
            assert all(n in pair for n, pair in zip(now, zip(old, data, strict=True), strict=True))
            content[offset : offset + len(data)] = now
        assert content == found
        for name, moment in moments.items():
            assert moment == (disk.snapshots / name).read_bytes(), (round_, name)
        assert sorted(moments) == sorted(os.listdir(disk.snapshots))


def test_killed_between_a_large_write_and_its_end(mount, tmp_path, monkeypatch):
    """The image has it, and nothing but the record of activity says that it was ours."""
    with preloaded("hold.c", tmp_path, monkeypatch):
        for fifo in ("before", "after"):
            os.mkfifo(tmp_path / fifo)
        monkeypatch.setenv("HOLD", str(tmp_path))
        disk = mount(os.urandom(SIZE))
    moment = disk.active.read_bytes()
    disk.create("s")
    new = os.urandom(8 * K64)
    for offset in range(0, len(new), K64):  # so that it needs no copy
        disk.write(offset, moment[offset : offset + K64])
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(write_directly, disk.active, new)
        before = os.open(tmp_path / "before", os.O_WRONLY)  # when it is about to begin
        while "S" != state_of_thread(disk.pid):  # the daemon has nothing else to do
            pass
        os.close(before)
        after = os.open(tmp_path / "after", os.O_WRONLY)  # when it is over
        assert new == disk.image.read_bytes()[: len(new)]
        disk.kill()
        os.close(after)
        assert isinstance(written.exception(), OSError)
    disk.start()
    assert new + moment[len(new) :] == disk.active.read_bytes()
    assert moment == (disk.snapshots / "s").read_bytes()


@contextlib.contextmanager
def preloaded(source, tmp_path, monkeypatch):
    """Programs that begin meanwhile have it loaded before all else."""
    library = tmp_path / "preloaded.so"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    run(*command, Path(__file__).parents[1] / "support" / source, "-o", library, "-ldl")
    with monkeypatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        yield


def write_directly(path: Path, data: bytes) -> int:
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, len(data)) as aligned:
            aligned[:] = data
            return os.pwrite(fd, aligned, 0)
    finally:
        os.close(fd)


def state_of_thread(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("durability", ["process", "power"])
def test_killed_under_the_load_of_fio(mount, tmp_path, durability):
    """Sixteen writes at a time; fio's log says which have returned."""
    content = bytearray(os.urandom(SIZE))
    disk = mount(bytes(content), f"durability={durability}")
    moments: dict[str, bytes] = {}
    for round_ in range(3):
        moments[f"s{round_}"] = bytes(content)
        disk.create(f"s{round_}")
        before = disk.json("status")["counters"]["writes"]
        log = tmp_path / f"round{round_}"
        fio = subprocess.Popen(
            ["fio", "--name=x", f"--filename={disk.active}", "--rw=randwrite", "--bs=4k",
             "--iodepth=16", "--ioengine=libaio", "--direct=1", f"--size={SIZE}",
             f"--randseed={round_}", "--allow_file_create=0", f"--buffer_pattern={round_ + 1}",
             "--time_based", f"--runtime={PATIENCE}", f"--write_lat_log={log}", "--log_offset=1"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while fio.poll() is None and disk.json("status")["counters"]["writes"] < before + 100:
            pass
        disk.kill()
        output = fio.communicate()[0]
        assert fio.returncode, output
        lines = Path(f"{log}_lat.1.log").read_text().splitlines()
        returned = {int(line.split(",")[4]) for line in lines}
        assert 50 < len(returned), output
        disk.start()
        found = disk.active.read_bytes()
        assert found == disk.image.read_bytes()
        for offset in range(0, SIZE, 4096):
            block = found[offset : offset + 4096]
            written = block == bytes([round_ + 1]) * 4096
            assert written or offset not in returned, offset
            assert written or block == content[offset : offset + 4096], offset
        content[:] = found
        for name, moment in moments.items():
            assert moment == (disk.snapshots / name).read_bytes(), (round_, name)


def changed(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"changed behind our back")


def changed_with_old_times(path: Path) -> None:
    before = os.stat(path)
    changed(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, SIZE // 2)


@pytest.mark.parametrize("change", [changed, changed_with_old_times, cut])
@pytest.mark.parametrize("crash", [False, True])
def test_a_changed_image_makes_snapshots_lost(mount, change, crash):
    disk = mount(os.urandom(SIZE))
    disk.create("s")
    moment = disk.active.read_bytes()
    disk.create("whole")
    disk.write(0, b"x" * SIZE)  # all of it is copied: the image is not needed
    disk.create("needs")
    if crash:
        disk.kill()
    else:
        disk.stop()
    change(disk.image)
    disk.start()
    done = disk.snapfs("list", disk.mountpoint, "--json", check=False)
    assert 4 == done.returncode
    states = {each["name"]: each["state"] for each in json.loads(done.stdout)["snapshots"]}
    assert {"s": "ok", "whole": "ok", "needs": "lost"} == states
    assert moment == (disk.snapshots / "s").read_bytes()
    with pytest.raises(OSError) as caught:
        os.open(disk.snapshots / "needs", os.O_RDONLY)
    assert errno.EIO == caught.value.errno
    (disk.snapshots / "needs").unlink()


def test_a_moved_image_is_recognised(mount):
    disk = mount(os.urandom(SIZE))
    moment = disk.active.read_bytes()
    disk.create("s")
    disk.write(0, b"x" * K64)
    disk.stop()
    there = disk.image.parent / "there"
    there.mkdir()
    run("cp", "--sparse=always", "-a", disk.image, disk.state, there)
    for directory in (there, disk.image.parent / "renamed"):
        if directory != there:
            os.rename(there, directory)
        disk.image = directory / disk.image.name
        disk.start()
        assert moment == (disk.snapshots / "s").read_bytes()
        disk.stop()


def test_an_unclean_reboot_makes_snapshots_lost(mount):
    disk = mount(os.urandom(SIZE))
    disk.create("s")
    disk.kill()
    manifest = disk.state / "manifest.json"
    text = manifest.read_text()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    manifest.write_text(text.replace(boot, "another boot"))
    disk.start()
    with pytest.raises(OSError, match="Input/output"):
        os.open(disk.snapshots / "s", os.O_RDONLY)


def test_sigterm_is_clean_even_when_active_is_held_open(mount):
    disk = mount(os.urandom(SIZE))
    disk.create("s")
    holder = os.open(disk.active, os.O_RDWR)
    os.pwrite(holder, b"y" * K64, 0)
    process = os.pidfd_open(disk.pid)
    os.kill(disk.pid, 15)
    assert select.select([process], [], [], PATIENCE)[0]
    os.close(process)
    assert '"clean": true' in (disk.state / "manifest.json").read_text()
    assert b"y" * K64 == disk.image.read_bytes()[:K64]
    assert "in use by" in (disk.state / "daemon.log").read_text()
    with contextlib.suppress(OSError):  # flush of a dead mount
        os.close(holder)
    disk.start()
    assert b"y" * K64 == disk.read("active", 0, K64)
