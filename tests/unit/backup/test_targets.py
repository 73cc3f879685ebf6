"""qcow2 targets: what a failed flush means for what was flushed before."""

from __future__ import annotations

import errno
import os
import shutil

import pytest

from snapfs.backup import targets
from snapfs.backup.extents import Extents
from snapfs.backup.layers import Layer
from snapfs.backup.targets import Coding, Qcow2Target
from snapfs.errors import NotStored

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-utils")

K64 = 1 << 16
PLAIN = Coding()


@pytest.fixture
def make(tmp_path):
    made = []

    def factory(size: int = 1 << 20, coding: Coding = PLAIN) -> Qcow2Target:
        path = str(tmp_path / "a.qcow2")
        coding.create(path, size, None, alone=True)
        made.append(
            Qcow2Target(path, size, resumable=True, alone=True, below=Extents(), coding=coding)
        )
        return made[-1]

    yield factory
    for each in made:
        each.abandon()


@pytest.mark.parametrize(
    ("number", "full", "kind"),
    [
        (errno.EIO, False, NotStored),
        (errno.EIO, True, NotStored),
        (errno.ENOSPC, False, NotStored),
        (errno.ENOSPC, True, OSError),
        (errno.EDQUOT, False, OSError),
    ],
)
def test_a_sync_that_failed_is_told_from_a_full_disk(make, monkeypatch, number, full, kind):
    target = make()
    target.write(0, b"x" * K64)
    target.flush()

    def fail(path: str) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(targets, "sync_file", fail)
    monkeypatch.setattr(targets, "_is_full", lambda path: full)
    with pytest.raises(kind, match=os.strerror(number)):
        target.flush()


def test_what_is_compressed_is_written_in_whole_clusters_each_once(make, tmp_path):
    size = 5 * K64 + 700
    target = make(size, Coding(compress=True))
    content = bytearray(size)
    for start, length in ((100, 50), (4096, 9000), (K64 - 10, 3 * K64), (5 * K64, 700)):
        content[start : start + length] = bytes([start % 250 + 1]) * length
        target.write(start, content[start : start + length])
    target.finish()
    with Layer([str(tmp_path / "a.qcow2")]) as layer:
        assert -(-size // 512) * 512 == layer.size
        assert content == layer.content(0, size)
    again = Qcow2Target(
        str(tmp_path / "a.qcow2"), size, resumable=True, alone=True, below=Extents(),
    )  # fmt: skip
    again.forget_from(2 * K64)
    again.finish()
    with Layer([str(tmp_path / "a.qcow2")]) as layer:
        assert content[: 2 * K64] + bytes(size - 2 * K64) == layer.content(0, size)
