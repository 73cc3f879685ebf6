"""kill -9 at any moment: no dirty bitmap lacks a change, no interval loses one."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess

import pytest

from tests.support.mounted import SNAPFS
from tests.support.writing import killed_while_writing

pytestmark = pytest.mark.mount

K64 = 1 << 16
CLUSTERS = 64
SIZE = CLUSTERS * K64


def extents(disk, name: str) -> set[int]:
    text = (disk.mountpoint / "bitmaps" / name).read_text()
    found = set()
    for line in text.splitlines():
        offset, length = map(int, line.split())
        found |= set(range(offset // K64, -(-(offset + length) // K64)))
    return found


def differing(one: bytes, other: bytes) -> set[int]:
    length = max(len(one), len(other))
    return {
        offset // K64
        for offset in range(0, length, K64)
        if one[offset : offset + K64] != other[offset : offset + K64]
    }


@pytest.mark.parametrize("seed", range(3))
def test_every_change_is_in_the_bitmap_after_a_kill(mount, seed):
    chance = random.Random(seed)
    disk = mount(os.urandom(SIZE))
    base = disk.active.read_bytes()
    disk.snapfs("bitmap", "add", disk.mountpoint, "b")
    touched: set[int] = set()
    for _ in range(3):

        def write(fd: int) -> None:
            offset = chance.randrange(SIZE + 4 * K64)
            data = chance.randbytes(chance.choice((512, 4096, 2 * K64)))
            start = min(offset, os.fstat(fd).st_size)
            touched.update(range(start // K64, -(-(offset + len(data)) // K64)))
            os.pwrite(fd, data, offset)

        killed_while_writing(disk, chance.randrange(3, 60), write)
        found = extents(disk, "b")
        assert differing(base, disk.active.read_bytes()) <= found <= touched


@pytest.mark.parametrize("switch", ["--next", "--clear-bitmap"])
@pytest.mark.parametrize("seed", range(4))
def test_a_kill_beside_a_switch_of_intervals_loses_no_change(mount, seed, switch):
    """Either the snapshot is there with its bitmap, or the old interval goes on.

    `base` is what the last complete backup would hold; together with what may
    be read of a snapshot it must give the image of its moment.
    """
    chance = random.Random(seed)
    base = os.urandom(SIZE)
    disk = mount(base)
    current = "b0"
    disk.snapfs("bitmap", "add", disk.mountpoint, current)
    for round_ in range(4):
        for _ in range(chance.randrange(1, 6)):
            disk.write(chance.randrange(CLUSTERS) * K64, chance.randbytes(4096))
        name, following = f"s{round_}", f"b{round_ + 1}"
        options = ["--bitmap", current, *([switch, following] if switch == "--next" else [switch])]
        child = subprocess.Popen(
            [*SNAPFS, "create", disk.mountpoint, name, *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        for _ in range(chance.randrange(40)):  # the kill comes anywhere in its course
            disk.write(chance.randrange(CLUSTERS) * K64, chance.randbytes(512))
        disk.kill()
        child.communicate()
        disk.start()
        now = disk.active.read_bytes()
        bitmaps = set(os.listdir(disk.mountpoint / "bitmaps"))
        if name not in os.listdir(disk.snapshots):
            assert {current} == bitmaps
            assert differing(base, now) <= extents(disk, current)
            continue
        base = with_what_can_be_read(disk, name, base)
        if switch == "--next":
            assert {current, following} == bitmaps
            disk.snapfs("bitmap", "remove", disk.mountpoint, current)
            current = following
        assert differing(base, now) <= extents(disk, current)


def with_what_can_be_read(disk, name: str, base: bytes) -> bytes:
    """The previous backup with an incremental one applied."""
    result = bytearray(base)
    with open(disk.snapshots / name, "rb", buffering=0) as file:
        for cluster in range(CLUSTERS):
            with contextlib.suppress(PermissionError):
                result[cluster * K64 : (cluster + 1) * K64] = os.pread(
                    file.fileno(), K64, cluster * K64
                )
    return bytes(result)


@pytest.mark.parametrize("moment", ["image changed", "killed"])
def test_an_image_written_by_others_makes_its_bitmaps_inconsistent(mount, moment):
    disk = mount(os.urandom(SIZE))
    disk.snapfs("bitmap", "add", disk.mountpoint, "b")
    if moment == "killed":
        disk.kill()
    else:
        disk.stop()
    with open(disk.image, "r+b") as file:
        file.write(b"behind our back")
    disk.start()
    (bitmap,) = disk.json("status")["bitmaps"]
    assert (True, False) == (bitmap["inconsistent"], bitmap["recording"])
    assert "changed while it was not mounted" in bitmap["reason"]
