"""A mounted image with a backup directory, and what the image was at each point."""

from __future__ import annotations

import json
import random
from pathlib import Path

from attrs import define, field

from tests.support.mounted import SNAPFS, Mounted, run
from tests.support.patched import Program, held_copy

OURS = {f"snapfs-backup.{suffix}" for suffix in ("json", "lock", "readers", "verified")}
K64 = 1 << 16
MIB = 1 << 20


@define
class Disk:
    """A mounted image, its backup directory, and what the image was at each point."""

    mounted: Mounted
    directory: Path
    scratch: Path
    moments: dict[int, bytes] = field(factory=dict)
    reading: list[str] = field(factory=list)  # options that it takes to read points

    def backup(self, *options: str) -> dict:
        now = self.mounted.active.read_bytes()
        done = self.mounted.snapfs(
            "backup", self.mounted.mountpoint, self.directory, "--json", *options
        )
        summary = json.loads(done.stdout.splitlines()[-1])
        self.moments[summary["number"]] = now
        return summary

    def change(self, seed: int) -> None:
        """Some data, some zeros, some nothing."""
        chance = random.Random(seed)
        size = self.mounted.image.stat().st_size
        for _ in range(3):
            offset = chance.randrange(max(1, size - 2 * K64))
            self.mounted.write(offset, chance.randbytes(min(K64, size - offset)))
        offset = chance.randrange(size // K64 + 1) * K64
        run("fallocate", "-p", "-o", str(offset), "-l", str(2 * K64), self.mounted.active)

    def restored(self, number: int | str, directory: Path | None = None) -> bytes:
        dest = self.scratch / "restored"
        dest.unlink(missing_ok=True)
        where = directory or self.directory
        run(*SNAPFS, "restore", where, dest, "--at", str(number), *self.reading)
        assert not (self.scratch / "restored.partial").exists()
        return dest.read_bytes()

    def manifest(self) -> dict:
        return json.loads((self.directory / "snapfs-backup.json").read_text())

    def check_images(self, directory: Path) -> None:
        """Every point is what the image was, for qemu-img; quicker than `check_all`."""
        manifest = json.loads((directory / "snapfs-backup.json").read_text())
        for point in manifest["points"]:
            raw = self.scratch / "raw"
            run("qemu-img", "convert", "-O", "raw", directory / f"{point['name']}.qcow2", raw)
            expected = self.moments[point["number"]]
            assert expected == raw.read_bytes()[: len(expected)], point["name"]

    def check_all(self, directory: Path | None = None) -> None:
        """Every point is what the image was, for us and for qemu-img."""
        where = directory or self.directory
        manifest = json.loads((where / "snapfs-backup.json").read_text())
        for point in manifest["points"]:
            expected = self.moments[point["number"]]
            assert expected == self.restored(point["number"], where), point["name"]
            image, raw = where / f"{point['name']}.qcow2", self.scratch / "raw"
            if self.reading:
                continue
            run("qemu-img", "check", image)
            run("qemu-img", "convert", "-O", "raw", image, raw)
            assert expected == raw.read_bytes()[: len(expected)], point["name"]
        run(*SNAPFS, "verify", where, *self.reading)


def names(disk: Disk, kind: str) -> list[str]:
    if kind == "bitmaps":
        listed = json.loads(
            disk.mounted.snapfs("bitmap", "list", disk.mounted.mountpoint, "--json").stdout
        )
        return [each["name"] for each in listed["bitmaps"]]
    return [each["name"] for each in disk.mounted.json("list")["snapshots"]]


def check_tidy(disk: Disk) -> None:
    """One bitmap, of the last point; no snapshot; no file but those of the points."""
    manifest = disk.manifest()
    assert [f"backup-{manifest['id']}-{manifest['points'][-1]['token']}"] == names(disk, "bitmaps")
    assert [] == names(disk, "snapshots")
    expected = set()
    for point in manifest["points"]:
        expected |= {f"{point['name']}.qcow2", f"{point['name']}.sums"}
    assert expected == {path.name for path in disk.directory.iterdir()} - OURS


def servers_of(directory: Path) -> list[str]:
    """The programs of QEMU that work in a directory."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(path.read_text(errors="surrogateescape"))
        except OSError:
            continue  # it has ended
    return [each for each in commands if "qemu-" in each and str(directory) in each]


def held_backup(it: Disk, *options: str) -> Program:
    """A backup that has copied some, and goes on when it is told."""
    backup = Program(held_copy(4 * MIB), "backup", it.mounted.mountpoint, it.directory, *options)
    backup.wait_reached()
    assert names(it, "snapshots")
    return backup


def spoil(path: Path, old: bytes) -> None:
    """Change the first place in a file where these bytes are."""
    content = path.read_bytes()
    where = content.index(old)
    with open(path, "r+b") as file:
        file.seek(where)
        file.write(bytes(byte ^ 1 for byte in old))
