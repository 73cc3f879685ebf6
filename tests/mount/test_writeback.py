"""What the kernel could not write back, and says once: nothing that it took is called ok."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.failing import Failing, drop, failing, journaled, thin, told, write_back
from tests.support.mounted import SNAPFS, Mounted, run
from tests.support.patched import Patched

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif("os.geteuid()", reason="needs root to mount, and to drop caches"),
]

MIB = 1 << 20
K64 = 1 << 16
OLD = os.urandom(4 * MIB)


NO_BEAT = """
import snapfs.daemon.daemon as daemon
daemon.ASK_SECONDS = 1000
"""


@pytest.fixture
def storage(tmp_path) -> Iterator[Failing]:
    with failing(tmp_path / "storage") as found:
        yield found


@pytest.fixture(params=["fastpath", "no_fastpath"])
def ways(request) -> list[str]:
    return [] if request.param == "fastpath" else ["no_fastpath"]


@pytest.fixture
def on(mount, storage, ways) -> Callable[..., Mounted]:
    """Mounts an image; `what` is on the storage that fails: image, state or temp."""

    def make(what: str, *options: str) -> Mounted:
        where = {"state": f"state={storage.where}/state", "temp": f"temp-dir={storage.where}"}
        extra = [where[what]] if what in where else []
        if what != "temp":
            extra.append("any_fs")  # of FUSE nobody knows whether it is the same after a death
        disk = mount(OLD, "temp-reserve=0", *extra, *options, *ways, start=False)
        if what == "image":
            shutil.copyfile(disk.image, storage.where / "disk.img")
            disk.image = storage.where / "disk.img"
            disk.options.append(f"state={disk.mountpoint.with_suffix('.state')}")
        return disk.start()

    return make


def snapshot(disk: Mounted, name: str = "s") -> dict:
    return disk.json("show", name, check=False)["snapshot"]


def is_lost(disk: Mounted, name: str = "s", number: int = errno.EIO) -> None:
    """Everything that tells of the snapshot tells it."""
    found = snapshot(disk, name)
    assert ("lost", number) == (found["state"], found["errno"])
    assert "written back" in found["reason"]
    with pytest.raises(OSError, match="Input/output error"):
        os.open(disk.snapshots / name, os.O_RDONLY)
    assert 4 == disk.snapfs("list", disk.mountpoint, check=False).returncode


def is_right(disk: Mounted, name: str, content: bytes) -> None:
    assert "ok" == snapshot(disk, name)["state"]
    assert content == (disk.snapshots / name).read_bytes()


def umount(disk: Mounted) -> subprocess.CompletedProcess[str]:
    done = disk.snapfs("umount", disk.mountpoint, check=False)
    disk.pid = None
    assert not os.path.ismount(disk.mountpoint)
    return done


def state_of(disk: Mounted) -> Path:
    option = next((each for each in disk.options if each.startswith("state=")), None)
    return disk.state if option is None else Path(option.removeprefix("state="))


# Temp images


@pytest.mark.parametrize("end", ["kill", "unmount"])
def test_a_temp_image_that_could_not_be_written_back(on, storage, end):
    disk = on("temp")
    disk.create("a")
    disk.write(0, b"1" * K64)  # in the temp image of a
    disk.create("b")
    write_back(storage.where)
    reader = os.open(disk.snapshots / "b", os.O_RDONLY)
    with storage.broken("*.temp"):
        disk.write(MIB, b"2" * MIB)  # in that of b, which both need
        disk.create("c")
        disk.write(2 * MIB, b"3" * K64)  # in that of c, which all need
    for name in "abc":
        is_lost(disk, name)
    with pytest.raises(OSError, match="Input/output error"):
        os.pread(reader, 1, 3 * MIB)
    os.close(reader)
    events = disk.snapfs("events", disk.mountpoint, "--once").stdout
    assert 3 == events.count(" lost snapshot=")
    now = disk.active.read_bytes()
    if end == "kill":
        disk.kill()
    else:
        done = umount(disk)
        assert 7 == done.returncode
        assert "snapshot 'a' is lost" in done.stderr
    checked = disk.snapfs("check", state_of(disk), check=False)
    assert 4 == checked.returncode
    assert 3 == checked.stdout.count("could not be written back")
    disk.start()
    for name in "abc":
        is_lost(disk, name)
    assert now == disk.active.read_bytes()
    for name in "abc":
        (disk.snapshots / name).unlink()
    disk.create("d")
    disk.write(0, b"4" * MIB)
    is_right(disk, "d", now)
    assert 0 == umount(disk).returncode


def test_a_snapshot_is_lost_only_if_it_finds_something_there(on, storage):
    disk = on("temp")
    disk.create("a")
    disk.write(0, b"1" * MIB)
    disk.create("b")
    now = disk.active.read_bytes()
    write_back(storage.where)
    newest = max(storage.where.rglob("*.temp"), key=lambda path: path.stat().st_ino)
    # What a needs is in its own temp image and in the image.
    with storage.broken(newest.name):
        disk.write(0, b"2" * MIB)
    is_lost(disk, "b")
    is_right(disk, "a", OLD)
    disk.write(2 * MIB, b"3" * MIB)  # copied once more for a, into what is sound again
    is_right(disk, "a", OLD)
    disk.create("c")
    assert now[:4096] != disk.read("snapshots/c", 0, 4096)
    umount(disk)
    disk.start()
    is_lost(disk, "b")
    is_right(disk, "a", OLD)


@pytest.mark.parametrize("call", ["read", "large read", "lseek"])
def test_nobody_reads_what_is_there_instead(on, storage, call):
    """The page is gone, and nobody has asked yet but the reader."""
    disk = on("temp")
    umount(disk)
    daemon = Patched(disk, NO_BEAT)
    disk.create("s")
    fd = os.open(disk.snapshots / "s", os.O_RDONLY)
    disk.write(0, b"1" * MIB)
    with storage.broken("*.temp"):
        pass
    with pytest.raises(OSError, match="Input/output error"):
        if call == "lseek":
            os.lseek(fd, 0, os.SEEK_HOLE)
        os.pread(fd, 4096 if call == "read" else MIB, 0)
    os.close(fd)
    is_lost(disk)
    umount(disk)
    daemon.finish()


@pytest.mark.parametrize("length", [4096, MIB])
def test_nobody_reads_a_copy_of_what_was_there_instead(on, storage, length):
    """The temp image is sound; the image was not when the copy was made, and nobody has asked."""
    disk = on("image")
    umount(disk)
    daemon = Patched(disk, NO_BEAT)
    disk.write(0, b"1" * MIB)
    disk.create("s")
    reader = os.open(disk.snapshots / "s", os.O_RDONLY)
    writer = os.open(disk.active, os.O_RDWR)
    with storage.broken("disk.img"):
        pass
    os.pwrite(writer, b"2" * MIB, 0)
    with pytest.raises(OSError, match="Input/output error"):
        os.pread(reader, length, 0)
    os.close(reader)
    os.close(writer)
    is_lost(disk)
    umount(disk)
    daemon.finish()


@pytest.mark.parametrize("program", ["dd", "cp", "fio"])
def test_programs_on_a_thin_temp_file_system(mount, tmp_path, ways, program):
    content = os.urandom(32 * MIB)
    new = tmp_path / "new"
    new.write_bytes(os.urandom(32 * MIB))
    with thin(tmp_path / "thin", 64 * MIB, 12 * MIB) as where:
        disk = mount(content, f"temp-dir={where}", "temp-reserve=0", *ways)
        disk.create("s")
        if program == "dd":
            run("dd", f"if={new}", f"of={disk.active}", "bs=1M", "conv=notrunc,fsync")
        elif program == "cp":
            run("cp", "--no-preserve=all", new, disk.active)
        else:
            run(
                "fio", "--name=x", f"--filename={disk.active}", "--rw=randwrite", "--bs=64k",
                "--size=32m", "--fsync=8", "--ioengine=psync",
            )  # fmt: skip
        write_back(where)
        drop(where)
        found = snapshot(disk)
        assert "lost" == found["state"], found
        is_lost(disk, number=found["errno"])
        if program != "fio":
            assert new.read_bytes() == disk.active.read_bytes()
        assert 7 == umount(disk).returncode
        assert "is lost" in disk.snapfs("check", disk.image, check=False).stdout


# Bitmaps


@pytest.mark.parametrize("end", ["kill", "unmount"])
@pytest.mark.parametrize("name", ["done", "access", "losses"])
def test_what_tells_of_a_temp_image_could_not_be_written_back(on, storage, name, end):
    disk = on("state")
    disk.create("s")
    with storage.broken(name):
        disk.write(0, b"1" * MIB)
        # It may be lost by now; then it cannot be opened.
        run(
            "fallocate", "-p", "-o", str(2 * MIB), "-l", str(K64), disk.snapshots / "s", check=False
        )
    found = snapshot(disk)
    if found["state"] == "ok":  # nothing of that file was dirty
        assert "losses" == name
        assert OLD[:MIB] == disk.read("snapshots/s", 0, MIB)
    else:
        is_lost(disk)
    disk.kill() if end == "kill" else umount(disk)
    disk.start()
    assert ("lost" if end == "kill" else found["state"]) == snapshot(disk)["state"]


@pytest.mark.parametrize("end", ["kill", "unmount"])
def test_a_dirty_bitmap_that_could_not_be_written_back(on, storage, end):
    disk = on("state")
    disk.snapfs("bitmap", "add", disk.mountpoint, "x")
    (file,) = (storage.where / "state" / "bitmaps").iterdir()
    with storage.broken(file.name):
        disk.write(0, b"1" * MIB)
    _is_inconsistent(disk)
    if end == "kill":
        disk.kill()
    else:
        assert "bitmap 'x' is inconsistent" in umount(disk).stderr
    assert "is inconsistent" in disk.snapfs("check", state_of(disk), check=False).stdout
    disk.start()
    _is_inconsistent(disk)
    disk.snapfs("bitmap", "clear", disk.mountpoint, "x")
    assert not disk.json("status")["bitmaps"][0]["inconsistent"]


def _is_inconsistent(disk: Mounted) -> None:
    (found,) = disk.json("status", check=False)["bitmaps"]
    assert found["inconsistent"]
    assert "written back" in found["reason"]
    done = disk.snapfs("create", disk.mountpoint, "s", "--bitmap", "x", check=False)
    assert 6 == done.returncode


# The image


@pytest.mark.parametrize("durability", ["process", "power"])
def test_every_handle_is_told_of_an_image_that_was_not_written_back(on, storage, durability):
    disk = on("image", f"durability={durability}")
    plain = [os.open(storage.where / "disk.img", os.O_RDWR) for _ in range(2)]
    handles = [os.open(disk.active, os.O_RDWR) for _ in range(2)]
    disk.create("before")
    assert [0, 0] == [told(fd) for fd in handles]
    with storage.broken("disk.img"):
        for number, fd in enumerate(handles):
            os.pwrite(fd, b"1" * MIB, number * MIB)
    assert [errno.EIO] * 2 == [told(fd) for fd in plain], "so does the plain file"
    done = disk.snapfs("create", disk.mountpoint, "s", check=False)
    assert 1 == done.returncode
    assert "written back" in done.stderr
    for _ in range(2):
        assert [errno.EIO] * 2 == [told(fd) for fd in handles]
    later = os.open(disk.active, os.O_RDWR | os.O_DSYNC)
    assert errno.EIO == told(later)
    with pytest.raises(OSError, match="Input/output error"):
        os.pwrite(later, b"2" * 4096, 2 * MIB)
    for fd in (*plain, *handles, later):
        os.close(fd)
    status = disk.json("status", check=False)
    assert not status["mount"]["healthy"]
    assert "written back" in status["mount"]["reason"]
    is_right(disk, "before", OLD)
    done = umount(disk)
    assert 7 == done.returncode
    assert "the image could not be written back" in done.stderr
    assert not json.loads((state_of(disk) / "manifest.json").read_bytes())["clean"]
    disk.start()
    assert ["lost"] == [each["kind"] for each in disk.json("status", check=False)["problems"]]
    disk.create("s")
    fd = os.open(disk.active, os.O_RDWR)
    assert 0 == told(fd)
    os.close(fd)
    assert 0 == umount(disk).returncode


@pytest.mark.parametrize("end", ["kill", "unmount"])
def test_a_snapshot_of_a_write_that_is_gone_is_lost(on, storage, end):
    disk = on("image")
    disk.create("old")
    fd = os.open(disk.active, os.O_RDWR)
    assert 0 == told(fd)  # what old finds in the image is durable now
    disk.snapfs("bitmap", "add", disk.mountpoint, "x")
    with storage.broken("disk.img"):
        os.pwrite(fd, b"1" * MIB, 0)
        disk.create("s")  # before the write-back: what is in it is only in the page cache
        disk.create("t")
        os.pwrite(fd, b"2" * MIB, 0)  # t finds there what was copied
        os.pwrite(fd, b"3" * MIB, 3 * MIB)
    os.close(fd)
    for name in ("s", "t"):
        is_lost(disk, name)
    is_right(disk, "old", OLD)
    assert disk.json("status", check=False)["bitmaps"][0]["inconsistent"]
    disk.kill() if end == "kill" else umount(disk)
    disk.start()
    for name in ("s", "t"):
        is_lost(disk, name)
    assert disk.json("status", check=False)["bitmaps"][0]["inconsistent"]


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("end", ["kill", "unmount"])
def test_the_next_mount_sees_what_is_stored(on, storage, end, durability):
    """What could not be is in the page cache all the same, for as long as its pages are."""
    disk = on("image", f"durability={durability}")
    disk.snapfs("bitmap", "add", disk.mountpoint, "before")
    storage.break_down("disk.img")
    disk.write(0, b"1" * MIB)
    write_back(storage.where)
    storage.break_down()
    assert b"1" == disk.read("active", 0, 1)
    for words in (("create",), ("bitmap", "add"), ("bitmap", "clear")):
        name = "before" if words[-1] == "clear" else "later"
        done = disk.snapfs(*words, disk.mountpoint, name, check=False)
        assert (1, True) == (done.returncode, "written back" in done.stderr)
    disk.kill() if end == "kill" else umount(disk)
    disk.start()
    disk.create("s")
    disk.snapfs("bitmap", "add", disk.mountpoint, "later")
    now = disk.active.read_bytes()
    drop(storage.where)
    is_right(disk, "s", now)
    assert now == OLD


def test_what_fsync_alone_tells_of_the_image(on, storage):
    """Such as a journal that was aborted: no page says anything."""
    disk = on("image")
    handles = [os.open(disk.active, os.O_RDWR) for _ in range(2)]
    os.pwrite(handles[0], b"1" * K64, 0)
    disk.create("s")
    storage.fail_fsync("disk.img")
    assert [errno.EIO] * 2 == [told(fd) for fd in handles]
    for fd in handles:
        os.close(fd)
    is_lost(disk)
    assert 7 == umount(disk).returncode


@pytest.mark.parametrize("program", ["dd", "cp", "fio"])
def test_programs_on_an_image_on_a_thin_file_system(mount, tmp_path, ways, program):
    with thin(tmp_path / "thin", 64 * MIB, 12 * MIB) as where:
        disk = mount(0, *ways, start=False)
        disk.image = where / "disk.img"
        with open(disk.image, "wb") as file:
            file.truncate(32 * MIB)
        disk.options.append(f"state={tmp_path}/state")
        disk.start()
        disk.create("before")
        new = tmp_path / "new"
        new.write_bytes(os.urandom(32 * MIB))
        fd = os.open(disk.active, os.O_RDWR)
        assert 0 == told(fd)  # what before finds in the image is durable
        if program == "dd":
            dd = ("dd", f"if={new}", f"of={disk.active}", "bs=1M", "conv=notrunc,fsync")
            assert "fsync failed" in run(*dd, check=False).stderr
        elif program == "cp":
            run("cp", "--no-preserve=all", new, disk.active)
        else:
            fio = (
                "fio", "--name=x", f"--filename={disk.active}", "--rw=write", "--bs=64k",
                "--size=32m", "--fsync=8", "--ioengine=psync",
            )  # fmt: skip
            assert 0 != run(*fio, check=False).returncode
        assert 0 != told(fd)  # another handle, after fsync(2) of the first has told it
        assert 0 != told(fd)
        os.close(fd)
        assert 1 == disk.snapfs("create", disk.mountpoint, "s", check=False).returncode
        is_right(disk, "before", bytes(32 * MIB))
        assert 7 == umount(disk).returncode
        disk.start()
        is_right(disk, "before", bytes(32 * MIB))
        umount(disk)


def test_what_ext4_drops_without_a_word_when_its_journal_is_aborted(mount, tmp_path, ways):
    where = tmp_path / "fs"
    with journaled(where) as fill:
        disk = mount(0, f"state={tmp_path}/state", *ways, start=False)
        disk.image = where / "disk.img"
        disk.image.write_bytes(OLD)
        os.truncate(disk.image, 2 * len(OLD))
        disk.start()
        run("sync", "-f", where)
        disk.write(len(OLD), b"1" * MIB)
        now = disk.active.read_bytes()
        disk.create("s")
        reader = os.open(disk.snapshots / "s", os.O_RDONLY)
        for number in range(200):  # for the journal
            (where / str(number)).touch()
        fill()
        write_back(where)
        with contextlib.suppress(OSError):
            drop(where)  # of the image, it is tried here
        try:
            assert now == os.pread(reader, 2 * len(OLD), 0)
        except OSError as error:
            assert errno.EIO == error.errno
            is_lost(disk)
        os.close(reader)
        assert 7 == umount(disk).returncode


# The end


@pytest.mark.parametrize("what", ["temp", "state", "image"])
def test_umount_tells_of_a_sync_that_failed_at_the_end(on, storage, what, ways):
    disk = on(what)
    disk.create("s")
    disk.write(0, b"1" * MIB)
    storage.break_down("*.temp", "done", "access", "losses", "disk.img")
    done = umount(disk)
    storage.break_down()
    assert 7 == done.returncode
    assert "not all of it is stored" in done.stderr
    drop(storage.where)
    disk.start()
    if what != "image":  # else the pages that were not tried again may be there or not
        assert "lost" == snapshot(disk)["state"]
    else:
        assert "lost" == snapshot(disk)["state"] or OLD == (disk.snapshots / "s").read_bytes()


def test_the_daemon_outlives_state_files_that_cannot_even_be_closed(on, storage):
    disk = on("state")
    disk.create("s")
    disk.write(0, b"1" * MIB)
    process = os.pidfd_open(disk.pid)
    storage.break_down("*.temp", "done", "access", "losses")
    while snapshot(disk)["state"] == "ok":
        os.sched_yield()
    disk.write(MIB, b"2" * MIB)
    assert b"1" * MIB + b"2" * MIB + OLD[2 * MIB :] == disk.active.read_bytes()
    assert ([], [], []) == select.select([process], [], [], 0)
    os.close(process)
    assert "not all of it is stored" in umount(disk).stderr
    storage.break_down()


def test_umount_and_systemd_are_told_by_exit_status(on, storage, tmp_path):
    disk = on("temp")
    umount(disk)
    daemon = Patched(disk, "")
    disk.create("s")
    disk.write(0, b"1" * MIB)
    (temp,) = storage.where.rglob("*.temp")
    with storage.broken(temp.name):
        pass
    helper = tmp_path / "umount.fuse.snapfs"
    helper.symlink_to(Path(SNAPFS[0]).with_name("snapfs"))
    done = run(helper, disk.mountpoint, check=False)
    assert 32 == done.returncode
    assert "snapshot 's' is lost" in done.stderr
    status, log = daemon.finish()
    assert 7 == status
    assert "snapshot 's' is lost" in log
    daemon = Patched(disk, "")
    daemon.process.send_signal(signal.SIGTERM)
    assert 0 == daemon.finish()[0], "it was lost before: nothing happened in this mount"


def test_umount_tells_of_a_daemon_that_was_killed_at_the_end(mount, ways):
    hold = """
import snapfs.state.store as store
sync = store.FileImage.sync
def held(self):
    reached()
    sync(self)
store.FileImage.sync = held
"""
    disk = mount(OLD, *ways, start=False)
    daemon = Patched(disk, hold)
    waiting = subprocess.Popen(
        [*SNAPFS, "umount", disk.mountpoint], stderr=subprocess.PIPE, text=True
    )
    daemon.wait_reached()
    daemon.process.kill()
    assert "was killed" in waiting.communicate()[1]
    assert 7 == waiting.returncode
    daemon.finish()


def test_umount_tells_that_the_daemon_gave_up(mount, ways):
    hold = """
import snapfs.state.store as store, snapfs.daemon.daemon as daemon
daemon.LAST_SECONDS = 1
def held(self):
    reached()
store.FileImage.sync = held
"""
    disk = mount(OLD, *ways, start=False)
    daemon = Patched(disk, hold)
    done = umount(disk)
    assert 7 == done.returncode
    assert "gave up waiting for the storage" in done.stderr
    assert 7 == daemon.finish()[0]


def test_a_lazy_umount_tells_it_too_if_nobody_uses_the_mount(on, storage, tmp_path, connections):
    disk = on("temp")
    disk.create("s")
    disk.write(0, b"1" * MIB)
    with storage.broken("*.temp"):
        pass
    helper = tmp_path / "umount.fuse.snapfs"
    helper.symlink_to(Path(SNAPFS[0]).with_name("snapfs"))
    done = run(helper, disk.mountpoint, "-l", check=False)
    assert 32 == done.returncode
    assert "snapshot 's' is lost" in done.stderr
    disk.start()
    fd = os.open(disk.active, os.O_RDONLY)
    process = os.pidfd_open(disk.pid)
    done = run(helper, disk.mountpoint, "-l")
    assert "once nobody uses it" in done.stderr
    os.close(fd)
    select.select([process], [], [])
    os.close(process)


def test_the_mount_of_a_dead_daemon_goes_but_not_silently(mount, ways):
    disk = mount(OLD, *ways)
    disk.kill()
    done = umount(disk)
    assert 7 == done.returncode
    assert "had died" in done.stderr
