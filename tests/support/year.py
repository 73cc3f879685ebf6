"""A year of backups in minutes: python -m tests.support.year DIRECTORY [--days N] [--seed N]

The clock of the daemon is the time of a file.  An image is written to and backed up, every hour
on busy days, to two disks in turn, a week each, that are small file systems; each night the points
are pruned.  Meanwhile bytes of points flip, a disk is full, clocks jump, and backup, prune,
restore and the daemon are killed.  Another machine gets what changed, through a pipe that is cut.

Every restore is compared with what was written, byte by byte; a point may be refused only if
it stands on what was damaged, and even then what can be salvaged must be right.  Takes root.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from attrs import define, field

from snapfs.backup import chain, cycle, pruning, receiving, restoring, sending, verifying
from snapfs.backup.extents import Extents
from snapfs.backup.retention import Policy
from snapfs.client.wire import Client
from snapfs.errors import SnapfsError
from tests.support.mounted import DYING, K64, MIB, Mounted, run
from tests.support.patched import Patched

START = datetime(2026, 1, 1, 7, tzinfo=UTC)
SIZE = 3 * MIB + 1234
LARGEST = 5 * MIB
POLICY = Policy(hourly=12, daily=7, weekly=5, monthly=12, yearly=2)

# The daemon's time is that of IMAGE.clock.
CLOCK = """
import time
from snapfs.engine import engine, tracker
class Clock:
    def __getattr__(self, name):
        return getattr(time, name)
    def time_ns(self):
        return os.stat(arguments[0] + ".clock").st_mtime_ns
engine.time = tracker.time = Clock()
"""


def quiet(_message: str) -> None:
    """Nobody reads what a soak says."""


class Wrong(Exception):
    """A byte that is not what it was, or a point that is lost without a reason."""


@define(eq=False)
class Disk:
    """A backup disk.  `moments`: what the image was at each time of a snapshot, by microsecond.

    `damaged`: numbers of points of which a file was damaged.
    """

    where: Path
    moments: dict[int, bytes] = field(factory=dict)
    damaged: set[int] = field(factory=set)

    @property
    def path(self) -> Path:
        return self.where / "points"

    def chain(self) -> chain.Chain:
        return chain.Directory(str(self.path)).chain

    def content(self, point: chain.Point) -> bytes:
        return self.moments[microseconds(point.time)]

    def is_hurt(self, point: chain.Point) -> bool:
        """Does a point stand on what was damaged?  A fold hands damage on to the next point."""
        known = self.chain()
        numbers = [each.number for each in known.points]
        hurt = {min((n for n in numbers if n >= bad), default=0) for bad in self.damaged}
        return any(each.number in hurt for each in known.lineage(point))

    def forget(self) -> None:
        """What became no point, and cannot any more."""
        points = self.chain().points
        kept = {microseconds(point.time) for point in points}
        newest = max(kept, default=0)
        for moment in [each for each in self.moments if each not in kept and each < newest]:
            del self.moments[moment]


def microseconds(time: datetime) -> int:
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


@define(eq=False)
class Year:
    """The machine, its two disks, and the other machine."""

    where: Path
    chance: random.Random
    disk: Mounted
    disks: list[Disk]
    content: bytearray = field(factory=lambda: bytearray(SIZE))
    now: datetime = START
    program: Patched | None = None
    totals: Counter[str] = field(factory=Counter)

    @classmethod
    def begin(cls, where: Path, seed: int, size: str = "192m") -> Year:
        machine, *places = (where / name for name in ("machine", "a", "b"))
        for place in (machine, *places):
            place.mkdir()
            run("mount", "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", place)
        disk = Mounted(machine / "disk.img", machine / "mnt")
        disk.mountpoint.mkdir()
        with open(disk.image, "wb") as file:
            file.truncate(SIZE)
        disks = [Disk(place) for place in places]
        for each in disks:
            chain.init(str(each.path))
        year = cls(machine, random.Random(seed), disk, disks)
        year.mount()
        return year

    def end(self) -> None:
        if self.program is not None:
            self.program.end(signal.SIGKILL)
        for path in (self.disk.mountpoint, self.where, *(each.where for each in self.disks)):
            run("umount", "-l", path, check=False)

    # The machine

    def mount(self) -> None:
        self.tick(timedelta())
        self.program = Patched(self.disk, CLOCK)
        self.program.go()

    def kill_daemon(self) -> None:
        assert self.program is not None
        self.program.end(signal.SIGKILL)
        self.program = None
        self.mount()
        if self.disk.active.read_bytes() != bytes(self.content):
            raise Wrong("the image, after a kill")
        self.totals["daemons killed"] += 1

    def tick(self, time: timedelta) -> None:
        """No two moments are the same, whatever the clock does."""
        self.now += time + timedelta(microseconds=self.chance.randrange(1, 10**6))
        clock = Path(f"{self.disk.image}.clock")
        clock.touch()
        stamp = microseconds(self.now) * 1000
        os.utime(clock, ns=(stamp, stamp))

    def work(self) -> None:
        """What a guest does: writes, some of zeros, holes, and now and then another size."""
        fd = os.open(self.disk.active, os.O_RDWR)
        try:
            for _ in range(self.chance.randrange(1, 5)):
                offset = self.chance.randrange(len(self.content))
                length = min(self.chance.choice((1, 4096, K64, 200_000)), LARGEST - offset)
                zeros = self.chance.random() < 0.2
                data = bytes(length) if zeros else self.chance.randbytes(length)
                os.pwrite(fd, data, offset)
                grown = offset + length - len(self.content)
                self.content.extend(bytes(max(0, grown)))
                self.content[offset : offset + length] = data
            if self.chance.random() < 0.03:
                size = self.chance.randrange(MIB, LARGEST)
                os.ftruncate(fd, size)
                self.content[size:] = b""
                self.content.extend(bytes(size - len(self.content)))
        finally:
            os.close(fd)

    # Backups

    def backup(self, disk: Disk, *, step: int | None = None) -> bool:
        """A point; killed at a step, if that comes.  Was one added?"""
        self.tick(timedelta(seconds=1))
        disk.moments[microseconds(self.now)] = bytes(self.content)
        before = self.newest(disk)
        if step is not None:
            where = (str(self.disk.mountpoint), str(disk.path))
            done = run(*DYING, str(step), "backup", "--quiet", *where, check=False)
            self.totals["backups killed"] += done.returncode == -signal.SIGKILL
        else:
            options = cycle.BackupOptions(quiet=True, say=quiet, chat=quiet)
            cycle.backup(str(self.disk.mountpoint), str(disk.path), options)
        added = self.newest(disk) != before
        self.totals["points"] += added
        if added:
            disk.content(disk.chain().points[-1])  # the time is one that we know
        elif step is None:
            raise Wrong("a backup ended well and added no point")
        return added

    @staticmethod
    def newest(disk: Disk) -> int:
        points = disk.chain().points
        return points[-1].number if points else 0

    def prune(self, disk: Disk, *, step: int | None = None) -> None:
        before = {point.name for point in disk.chain().points}
        kept = POLICY.kept(disk.chain().points)
        try:
            if step is not None:
                words = ["--keep-hourly", "12", "--keep-daily", "7", "--keep-weekly", "5",
                         "--keep-monthly", "12", "--keep-yearly", "2"]  # fmt: skip
                done = run(*DYING, str(step), "prune", "--quiet", disk.path, *words, check=False)
                self.totals["prunes killed"] += done.returncode == -signal.SIGKILL
            else:
                options = pruning.PruneOptions(POLICY, say=quiet, chat=quiet)
                self.check_failed(disk, pruning.prune(str(disk.path), options)["failed"])
        except SnapfsError as error:
            if not disk.damaged:
                raise
            self.totals["prunes refused"] += 1
            print("year:", self.now.date(), "prune:", error, flush=True)
        after = {point.name for point in disk.chain().points}
        if not kept.keys() <= after <= before:
            raise Wrong(f"prune kept {after}, not {kept}")
        self.totals["points pruned"] += len(before) - len(after)
        disk.forget()

    def check_failed(self, disk: Disk, names: list[str]) -> None:
        """Only what is damaged stays."""
        for name in names:
            point = disk.chain().find(name)
            child = disk.chain().child(name)
            if not (disk.is_hurt(point) or (child and disk.is_hurt(child))):
                raise Wrong(f"{name} is called damaged by prune")
        self.totals["folds refused"] += len(names)

    def fill(self, disk: Disk) -> None:
        """A full disk: what cannot be added is in the next point, and pruning still works."""
        filler = disk.where / "filler"
        room = os.statvfs(disk.where)
        with open(filler, "wb") as file:
            left = self.chance.choice((0, K64, 300_000, MIB))
            os.posix_fallocate(file.fileno(), 0, max(1, room.f_bavail * room.f_frsize - left))
        before = self.newest(disk)
        with suppress(SnapfsError, OSError):
            self.backup(disk)
        self.totals["disks full"] += self.newest(disk) == before
        with suppress(SnapfsError, OSError):
            self.prune(disk)
        filler.unlink()

    def damage(self, disk: Disk) -> None:
        """One byte of one file of a point is another, or the file is cut, or gone."""
        points = disk.chain().points
        if not points:
            return
        point = self.chance.choice(points)
        path = disk.path / f"{point.name}.{self.chance.choice(('qcow2', 'qcow2', 'sums'))}"
        size = path.stat().st_size if path.exists() else 0
        if not size:
            return
        kind = self.chance.choice(("flip", "flip", "flip", "cut", "gone"))
        if kind == "flip":
            with open(path, "r+b") as file:
                at = self.chance.randrange(size)
                byte = os.pread(file.fileno(), 1, at)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << self.chance.randrange(8)]), at)
        elif kind == "cut":
            os.truncate(path, self.chance.randrange(size))
        else:
            path.unlink()
        disk.damaged.add(point.number)
        self.totals["files damaged"] += 1

    # Proving it

    def restore(self, disk: Disk, point: chain.Point) -> None:
        """It is what it was, byte by byte; or it stands on damage, and what is salvaged is."""
        dest = self.where / "restored"
        at = str(point.number)
        try:
            options = restoring.RestoreOptions(at=at, force=True, quiet=True)
            restoring.restore(str(disk.path), str(dest), options)
        except (SnapfsError, OSError) as error:
            if not disk.is_hurt(point):
                raise Wrong(f"{point.name} cannot be restored: {error}") from error
            self.totals["restores refused"] += 1
        else:
            if dest.read_bytes() != disk.content(point):
                raise Wrong(f"{point.name} is restored with wrong bytes")
            self.totals["restores"] += 1
            return
        with suppress(SnapfsError, OSError):
            options = restoring.RestoreOptions(at=at, force=True, salvage=True, quiet=True)
            result = restoring.restore(str(disk.path), str(dest), options)
            self.compare_salvaged(disk, point, dest.read_bytes(), result["damaged"])

    def compare_salvaged(
        self, disk: Disk, point: chain.Point, found: bytes, damaged: list[list[int]]
    ) -> None:
        """What is named is lost; nothing is, if a file is damaged of which no byte is needed."""
        expected = disk.content(point)
        bad = Extents((start, start + length) for start, length in damaged)
        if len(found) != len(expected):
            raise Wrong(f"{point.name} is salvaged with another size")
        for start, stop in bad.outside(0, len(expected)):
            if found[start:stop] != expected[start:stop]:
                raise Wrong(f"{point.name} is salvaged with wrong bytes in {start}-{stop}")
        self.totals["restores salvaged"] += 1

    def kill_restore(self, disk: Disk, step: int) -> None:
        """And the same command does it again."""
        points = disk.chain().points
        if not points:
            return
        dest = self.where / "killed"
        point = self.chance.choice(points)
        words = ["restore", "--quiet", disk.path, dest, "--at", str(point.number)]
        done = run(*DYING, str(step), *words, check=False)
        self.totals["restores killed"] += done.returncode == -signal.SIGKILL
        whole = not Path(f"{dest}.partial").exists() and dest.exists() and dest.stat().st_size
        if whole and dest.read_bytes() != disk.content(point):
            raise Wrong(f"{point.name}: a killed restore left a whole file with wrong bytes")
        for path in (dest, Path(f"{dest}.partial")):
            path.unlink(missing_ok=True)
        self.restore(disk, point)

    def verify(self, disk: Disk) -> None:
        """It finds what is damaged, and nothing else."""
        result = verifying.verify(str(disk.path), verifying.VerifyOptions(quiet=True))
        known = disk.chain()
        for row in result["points"]:
            point = known.find(row["point"])
            if not row["ok"] and not disk.is_hurt(point):
                raise Wrong(f"{point.name} is called damaged: {row['problems']}")
        self.totals["points verified"] += len(result["points"])

    # The other machine

    def send(self) -> None:
        """What changed goes there, through a pipe that is cut; and what has come is right."""
        image = self.where / "there.img"
        name, before = f"sent-{self.totals['sent']}", f"sent-{self.totals['sent'] - 1}"
        self.tick(timedelta(seconds=1))
        with Client(str(self.disk.mountpoint)) as client:
            client.call("create", name=name, bitmap=None, next=name)
        snapshot = str(self.disk.snapshots / name)
        since = f"{self.disk.mountpoint}/bitmaps/{before}" if image.exists() else None
        while True:
            state = receiving.state(str(image))["state"]
            with tempfile.TemporaryFile() as file:
                options = sending.SendOptions(since=since, resume=state, quiet=True)
                sending.send(snapshot, file.fileno(), options)
                stream = os.pread(file.fileno(), 1 << 30, 0)
            cut = self.chance.random() < 0.5
            if cut:
                stream = stream[: self.chance.randrange(len(stream))]
            try:
                settings = receiving.ReceiveOptions(quiet=True)
                receiving.receive(str(image), io.BytesIO(stream), settings)
            except SnapfsError:
                if not cut:
                    raise
                self.totals["streams cut"] += 1
            else:
                break
        if image.read_bytes() != bytes(self.content):
            raise Wrong("what was sent is not what has come")
        with Client(str(self.disk.mountpoint)) as client:
            client.call("delete", name=name)
            if since is not None:
                client.call("bitmap_remove", name=before)
        self.totals["sent"] += 1

    # Time

    def hour(self, disk: Disk) -> None:
        self.work()
        step = self.chance.randrange(1, 60) if self.chance.random() < 0.06 else None
        self.backup(disk, step=step)
        if self.chance.random() < 0.02:
            self.kill_daemon()
        self.tick(timedelta(hours=1))

    def day(self, number: int, busy: float) -> None:
        disk = self.disks[number // 7 % 2]
        for _ in range(14 if self.chance.random() < busy else 1):
            self.hour(disk)
        things = {
            "prune": 0.1, "fill": 0.04, "damage": 0.03, "restore": 0.1, "kill_restore": 0.1,
            "send": 0.15, "jump": 0.02,
        }  # fmt: skip
        drawn = [name for name, chance in things.items() if self.chance.random() < chance]
        self.happen(disk, *drawn)
        self.prune(disk)
        if number % 7 == 6:
            self.week(disk)
        self.now = self.now.replace(hour=7) + timedelta(days=1)

    def happen(self, disk: Disk, *things: str) -> None:
        """What does not go as planned, by name."""
        step = self.chance.randrange(1, 60)
        for thing in things:
            if thing == "prune":
                self.prune(disk, step=step)
            elif thing == "kill_restore":
                self.kill_restore(disk, step)
            elif thing == "restore" and disk.chain().points:
                self.restore(disk, self.chance.choice(disk.chain().points))
            elif thing == "jump":
                self.tick(self.chance.choice((-1, 1)) * timedelta(hours=1))
            elif thing == "send":
                self.send()
            elif thing in ("fill", "damage"):
                getattr(self, thing)(disk)

    def week(self, disk: Disk) -> None:
        """The disk goes away: is all of it good?"""
        self.verify(disk)
        for point in disk.chain().points[-2:]:
            self.restore(disk, point)

    def close(self) -> None:
        """Everything that is left, of both disks."""
        for disk in self.disks:
            self.verify(disk)
            for point in disk.chain().points:
                self.restore(disk, point)
        self.send()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--days", type=int, default=366)
    parser.add_argument("--busy", type=float, default=0.15, help="how many days have 14 points")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    arguments = parser.parse_args()
    print(f"year: seed {arguments.seed}", flush=True)
    year = Year.begin(arguments.directory, arguments.seed)
    try:
        for number in range(arguments.days):
            year.day(number, arguments.busy)
            if number % 30 == 29:
                print(year.now.date(), json.dumps(year.totals), flush=True)
        year.close()
        print(json.dumps(year.totals))
    except Wrong as wrong:
        sys.exit(f"year: {year.now}: {wrong}")
    finally:
        year.end()


if __name__ == "__main__":
    main()
