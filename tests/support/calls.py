"""What tests do with a mount, or ask it, in one call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.mounted import Mounted, run


def punch(path: Path, offset: int, length: int) -> None:
    run("fallocate", "-p", "-o", str(offset), "-l", str(length), path)


def errno_of(call, *arguments) -> int:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


def state_of(disk: Mounted, name: str) -> dict:
    done = disk.snapfs("show", disk.mountpoint, name, "--json", check=False)
    found = json.loads(done.stdout)["snapshot"]
    assert (4 if found["state"] != "ok" else 0) == done.returncode
    return found


def extents(disk, name: str) -> list[tuple[int, int]]:
    text = (disk.mountpoint / "bitmaps" / name).read_text()
    return [tuple(map(int, line.split())) for line in text.splitlines()]


def mapped(disk, name: str, *arguments) -> list[dict]:
    return json.loads(disk.snapfs("map", "--json", *arguments, disk.mountpoint / name).stdout)


def bitmap(disk, action: str, *words: str, check: bool = True):
    return disk.snapfs("bitmap", action, disk.mountpoint, *words, check=check)


def copy(disk, name, dest, *options, check=True):
    return disk.snapfs("copy", disk.snapshots / name, dest, *options, check=check)
