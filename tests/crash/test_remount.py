"""A file system goes away and comes back, without a reboot: what was only held is not ok."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.calls import state_of
from tests.support.devices import device, when_free
from tests.support.mounted import SNAPFS, Mounted, run

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root has loop devices"),
]

K64 = 1 << 16
SIZE = 64 * K64


@pytest.fixture
def made():
    """Mounts that end with the test."""
    mounts: list[Mounted] = []
    yield mounts.append
    for disk in mounts:
        disk.snapfs("umount", disk.mountpoint, check=False)
        run("umount", "-l", disk.mountpoint, check=False)


def disk_in(where: Path, tmp_path: Path, made, *options: str) -> Mounted:
    image = where / "disk.img"
    image.write_bytes(os.urandom(SIZE))
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    disk = Mounted(image, mountpoint, list(options))
    made(disk)
    return disk.start()


def kill(disk: Mounted) -> None:
    disk.kill()
    run("umount", "-l", disk.mountpoint)


def bitmap_reason(disk: Mounted) -> str | None:
    (bitmap,) = disk.json("status", check=False)["bitmaps"]
    return bitmap["reason"] if bitmap["inconsistent"] else None


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("how", ["in order", "shut down"])
def test_a_remount_is_a_reboot(tmp_path, made, kind, how):
    if kind == "btrfs" and how == "shut down":
        pytest.skip("btrfs cannot be shut down")
    with device(tmp_path / "fs", kind) as storage:
        disk = disk_in(storage.where, tmp_path, made)
        disk.snapfs("bitmap", "add", disk.mountpoint, "b")
        run("sync", "-f", disk.image)
        disk.create("s")
        disk.write(0, b"x" * 8 * K64)
        kill(disk)
        if how == "shut down":
            storage.shut_down()
        storage.unmount()
        storage.mount()
        report = disk.snapfs("check", disk.image, check=False)
        assert (4, True) == (report.returncode, "will be lost" in report.stdout)
        disk.start()
        found = state_of(disk, "s")
        assert "lost" == found["state"]
        assert "mounted anew" in found["reason"]
        assert "mounted anew" in str(bitmap_reason(disk))
        with pytest.raises(OSError) as caught:
            os.open(disk.snapshots / "s", os.O_RDONLY)
        assert errno.EIO == caught.value.errno
        disk.stop()


@pytest.mark.parametrize("what", ["image", "state", "temp"])
def test_each_of_image_state_and_temp_images_counts(tmp_path, made, what):
    with device(tmp_path / "fs") as storage, device(tmp_path / "other") as other:
        places = {
            name: (storage if name == what else other).where for name in ("image", "state", "temp")
        }
        temps = places["temp"] / "temps"
        temps.mkdir(mode=0o700)
        state = places["state"] / "state"
        options = (f"state={state}", f"temp-dir={temps}")
        disk = disk_in(places["image"], tmp_path, made, *options)
        moment = disk.active.read_bytes()
        disk.create("s")
        disk.write(0, b"x" * K64)
        kill(disk)
        disk.start()  # nothing has gone
        assert moment == (disk.snapshots / "s").read_bytes()
        kill(disk)
        storage.unmount()
        storage.mount()
        disk.start()
        assert "lost" == state_of(disk, "s")["state"]
        disk.stop()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_other_mounts_of_the_same_file_system_lose_nothing(tmp_path, made, kind):
    """A bind mount, a remount, another mount namespace, from where the first is not seen."""
    with device(tmp_path / "fs", kind) as storage:
        disk = disk_in(storage.where, tmp_path, made)
        moment = disk.active.read_bytes()
        disk.create("s")
        disk.write(0, b"x" * K64)
        kill(disk)
        bound = tmp_path / "bound"
        bound.mkdir()
        run("mount", "--bind", storage.where, bound)
        when_free("mount", "-o", "remount,ro", bound)
        run("mount", "-o", "remount,rw", bound)
        storage.unmount()
        disk.image = bound / "disk.img"
        try:
            disk.start()
            assert moment == (disk.snapshots / "s").read_bytes()
            kill(disk)
            words = shlex.join([*SNAPFS, "mount", str(disk.image), str(disk.mountpoint)])
            script = f"{words} && cat {disk.snapshots}/s && umount {disk.mountpoint}"
            inside = ("unshare", "-m", "--propagation", "private", "bash", "-c", script)
            done = run(*inside, binary=True)
            assert moment == done.stdout
        finally:
            run("umount", bound)


def test_what_is_written_back_later_and_fails_is_not_ok(tmp_path, made):
    """The daemon is dead by then, so nobody hears of it but who asks the file system."""
    thin = tmp_path / "thin"
    thin.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", thin)
    try:
        # Without a journal, which may fail as well: then nothing could be opened for writing.
        with device(thin / "fs", options=("-O", "^has_journal")) as storage:
            temps = storage.where / "temps"
            temps.mkdir(mode=0o700)
            image = tmp_path / "images"
            image.mkdir()
            disk = disk_in(image, tmp_path, made, f"temp-dir={temps}")
            with open(disk.active, "r+b") as file:
                file.truncate(48 << 20)
                file.seek(0)
                file.write(os.urandom(48 << 20))
            disk.create("s")
            disk.write(0, b"x" * (48 << 20))
            kill(disk)
            for temp in temps.iterdir():
                fd = os.open(temp, os.O_RDONLY)
                with contextlib.suppress(OSError):
                    os.fsync(fd)  # it is told, and whoever opens the file later is not
                os.close(fd)
            disk.start()
            found = state_of(disk, "s")
            assert "lost" == found["state"]
            assert "could not store" in found["reason"]
            disk.stop()
    finally:
        run("umount", "-l", thin)


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("seed", range(7))
def test_no_trial_gives_a_wrong_byte(tmp_path, made, seed, durability):
    """Kill, shut down, and mount again at any moment: a snapshot is exact or not ok."""
    chance = random.Random(seed)
    with device(tmp_path / "fs", chance.choice(("ext4", "xfs"))) as storage:
        disk = disk_in(storage.where, tmp_path, made, f"durability={durability}")
        content = bytearray(disk.active.read_bytes())
        moments = {}
        seen = 0
        for round_ in range(2):
            name = f"s{round_}"
            moments[name] = bytes(content)
            disk.create(name)

            def write(fd: int) -> None:
                offset = chance.randrange(SIZE - 3 * K64)
                os.pwrite(fd, chance.randbytes(chance.choice((512, 4096, 2 * K64))), offset)

            for _ in range(chance.randrange(20)):
                with open(disk.active, "r+b", buffering=0) as file:
                    write(file.fileno())
            first = chance.random() < 0.5  # before the daemon dies, or after
            if first:
                with open(disk.active, "r+b", buffering=0) as file, contextlib.suppress(OSError):
                    storage.shut_down()
                    write(file.fileno())
            kill(disk)
            if not first and chance.random() < 0.7:
                storage.shut_down()
            storage.unmount()
            storage.mount()
            disk.start()
            for name, moment in moments.items():
                if state_of(disk, name)["state"] == "ok":
                    assert moment == (disk.snapshots / name).read_bytes(), name
                    seen += 1
            content[:] = disk.active.read_bytes()
        assert not seen or durability == "power"
        disk.stop()


# Copies of what was not unmounted in order


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("what", ["image", "state", "moved"])
def test_a_copy_made_meanwhile_is_not_of_one_moment(tmp_path, made, what, durability):
    """cp -a gives the image the times that it had at first, and then what is written meanwhile."""
    with device(tmp_path / "fs") as storage:
        disk = disk_in(storage.where, tmp_path, made, f"durability={durability}")
        moment = disk.active.read_bytes()
        disk.create("s")
        copy = storage.where / "copy.img"
        if what != "moved":
            run("cp", "-a", disk.state, f"{copy}.snapfs")
        status = disk.image.stat()
        disk.write(0, b"x" * 8 * K64)
        if what == "image":
            shutil.copyfile(disk.image, copy)
            os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
        elif what == "state":  # of another moment than the rest
            shutil.copy2(disk.state / "activity", f"{copy}.snapfs/activity")
        kill(disk)
        if what != "image":
            disk.image.rename(copy)
        if what == "moved":
            disk.state.rename(f"{copy}.snapfs")
        disk.image = copy
        lost = "will be lost" in disk.snapfs("check", disk.image, check=False).stdout
        assert (what != "moved") == lost
        disk.start()
        found = state_of(disk, "s")
        if what == "moved":
            assert moment == (disk.snapshots / "s").read_bytes()
        else:
            assert ("lost", True) == (found["state"], "is a copy" in found["reason"])
        disk.stop()


def test_a_snapshot_of_a_subvolume_is_a_copy(tmp_path, made):
    with device(tmp_path / "fs", "btrfs") as storage:
        volume = storage.where / "volume"
        run("btrfs", "subvolume", "create", volume)
        disk = disk_in(volume, tmp_path, made)
        disk.create("s")
        disk.write(0, b"x" * 8 * K64)
        run("btrfs", "subvolume", "snapshot", volume, storage.where / "copy")
        kill(disk)
        disk.image = storage.where / "copy" / "disk.img"
        disk.start()
        assert "lost" == state_of(disk, "s")["state"]
        disk.stop()


# A write that is in the kernel when the daemon dies


def waits_for_thaw(pid: int) -> bool:
    """Does a thread of it wait in the kernel for a frozen file system?"""
    places = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            places.append((task / "wchan").read_text())
    return any("percpu_rwsem_wait" in place for place in places)


def wait_for_end(process: int) -> None:
    select.select([process], [], [])  # it is not our child
    os.close(process)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("afterwards", ["nothing", "somebody writes"])
def test_a_write_that_goes_on_long_after_the_death_is_ours(tmp_path, made, kind, afterwards):
    """The file system is frozen; the times that the write leaves are those of the thaw."""
    with device(tmp_path / "fs", kind) as storage:
        # The state is elsewhere: else the record of activity is what waits.
        disk = disk_in(storage.where, tmp_path, made, f"state={tmp_path / 'state'}")
        moment = disk.active.read_bytes()
        disk.create("s")
        disk.write(0, b"x" * 8 * K64)  # needs no copy any more
        storage.freeze()
        writer = subprocess.Popen(
            ["dd", "if=/dev/zero", f"of={disk.active}", "bs=512k", "count=1", "conv=notrunc",
             "oflag=direct"],  # large: with no thought of whether it will wait
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        pid = disk.pid
        assert pid is not None
        while not waits_for_thaw(pid):
            time.sleep(0.01)
        process = os.pidfd_open(pid)
        os.kill(pid, 9)
        run("sleep", "4")  # longer than any grace that was ever given
        storage.thaw()
        disk.pid = None
        wait_for_end(process)
        writer.wait()
        run("umount", "-l", disk.mountpoint, check=False)
        if afterwards == "nothing":
            disk.start()
            assert moment == (disk.snapshots / "s").read_bytes()
        else:
            with open(disk.image, "r+b") as file:
                os.pwrite(file.fileno(), b"behind our back", SIZE - 100)
            disk.start()
            assert "lost" == state_of(disk, "s")["state"]
        disk.stop()
