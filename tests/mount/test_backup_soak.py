"""A file system in use, backed up round after round, some runs killed in the middle.

SNAPFS_SOAK_ROUNDS and SNAPFS_SOAK_SEED say how long and how; scripts/soak-backup
sets them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
from attrs import define

from tests.support.filesystems import make_ext4
from tests.support.mounted import SNAPFS, Mounted, run

pytestmark = [pytest.mark.mount, pytest.mark.slow, pytest.mark.timeout(2400)]

MIB = 1 << 20
K64 = 1 << 16
SIZE = 192 * MIB
ROUNDS = int(os.environ.get("SNAPFS_SOAK_ROUNDS", "4"))
SEED = int(os.environ.get("SNAPFS_SOAK_SEED", "1"))


@define
class Guest:
    """An ext4 file system on a loop device over `active`, and a thread that uses it."""

    disk: Mounted
    where: Path
    chance: random.Random
    device: str = ""

    def up(self) -> None:
        self.device = run("losetup", "--find", "--show", self.disk.active).stdout.strip()
        run("mount", self.device, self.where)

    def down(self) -> None:
        run("umount", self.where, check=False)
        run("losetup", "--detach", self.device, check=False)

    def work(self, count: int) -> None:
        """Write, overwrite, delete and trim some files."""
        for _ in range(count):
            path = self.where / f"file{self.chance.randrange(40)}"
            if path.exists() and self.chance.random() < 0.25:
                path.unlink()
                continue
            with open(path, "r+b" if path.exists() else "wb") as file:
                file.seek(self.chance.randrange(MIB))
                file.write(self.chance.randbytes(self.chance.randrange(1, 256 << 10)))
        if self.chance.random() < 0.3:
            run("fstrim", self.where, check=False)

    def freeze(self) -> None:
        run("fsfreeze", "-f", self.where)

    def thaw(self) -> None:
        run("fsfreeze", "-u", self.where)


def begin_backup(disk: Mounted, directory: Path, *options: str) -> subprocess.Popen[str]:
    """A backup, and return when its snapshot is there (or it has ended)."""
    left = snapshots(disk)  # by runs that were killed
    command = [*SNAPFS, "backup", str(disk.mountpoint), str(directory), "--json", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    before = {point["number"] for point in manifest(directory)["points"]}
    while process.poll() is None:
        points = {point["number"] for point in manifest(directory)["points"]}
        if snapshots(disk) - left or points != before:
            break
    return process


def snapshots(disk: Mounted) -> set[str]:
    return {each["name"] for each in disk.json("list")["snapshots"]}


def manifest(directory: Path) -> dict:
    return json.loads((directory / "snapfs-backup.json").read_text())


def differing(old: bytes, new: bytes) -> int:
    """Clusters that changed, those included that became zeros."""
    return sum(old[at : at + K64] != new[at : at + K64] for at in range(0, SIZE, K64))


def test_every_point_is_the_image_at_its_moment(mount, tmp_path):
    chance = random.Random(SEED)
    disk = mount(SIZE)
    make_ext4(disk.active)
    directory, kept = tmp_path / "backup", tmp_path / "kept"
    kept.mkdir()
    (tmp_path / "fs").mkdir()
    run(*SNAPFS, "backup", "--init", directory)
    guest = Guest(disk, tmp_path / "fs", chance)
    guest.up()
    copied = changed = killed = 0
    try:
        for number in range(ROUNDS):
            guest.work(12)
            kill = chance.choice(["", "", "client", "daemon"]) if number else ""
            guest.freeze()
            moment = kept / "now"
            run("cp", "--sparse=always", disk.active, moment)
            process = begin_backup(disk, directory, *(["--bwlimit", "2M"] if kill else []))
            guest.thaw()
            guest.work(4)  # while it is copied
            if kill == "client":
                process.send_signal(signal.SIGKILL)
            elif kill == "daemon":
                disk.kill()
            output, complaint = process.communicate()
            points = manifest(directory)["points"]
            done = {int(path.name) for path in kept.iterdir() if path.name != "now"}
            if points and points[-1]["number"] not in done:
                moment.rename(kept / str(points[-1]["number"]))
            else:
                assert kill, (output, complaint)
                killed += 1
            if kill == "daemon":
                guest.down()
                disk.start()
                assert run("e2fsck", "-fy", disk.active, check=False).returncode < 4
                guest.up()
        guest.down()
    except BaseException:
        guest.down()
        raise
    points = manifest(directory)["points"]
    assert 1 == sum(point["parent"] is None for point in points)  # kills cost no bitmap
    run(*SNAPFS, "verify", directory)
    before = None
    for point in points:
        expected = (kept / str(point["number"])).read_bytes()
        run(*SNAPFS, "restore", directory, tmp_path / "r", "--at", str(point["number"]), "--force")
        assert expected == (tmp_path / "r").read_bytes(), point["name"]
        if before is not None:
            copied += -(-point["data_bytes"] // K64)  # zeros cost nothing
            changed += differing(before, expected)
        before = expected
    print(f"seed {SEED}: {len(points)} points, {killed} runs killed; "
          f"increments have {copied} clusters, {changed} differ")  # fmt: skip
    # What is copied without having changed: clusters of which fstrim discards, after each
    # mount anew, blocks that were free and zero before; a discard is a change for a bitmap.
    assert copied <= 1.1 * changed
    run(*SNAPFS, "prune", directory, "--keep-last", "2")
    run(*SNAPFS, "verify", directory)
    for point in points[-2:]:
        run(*SNAPFS, "restore", directory, tmp_path / "r", "--at", str(point["number"]), "--force")
        assert (kept / str(point["number"])).read_bytes() == (tmp_path / "r").read_bytes()
