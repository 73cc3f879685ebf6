"""QEMU's programs: what of their complaints is waited for."""

from __future__ import annotations

import shutil
import time

import pytest

from snapfs.backup import qemu
from snapfs.errors import BackupError

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-utils")


@pytest.fixture(autouse=True)
def sleeps(monkeypatch):
    """What is slept in place of waiting."""
    slept: list[float] = []
    clock = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(qemu.time, "monotonic", lambda: clock[0])
    return slept


def test_a_path_or_a_message_with_lock_in_it_is_no_lock(tmp_path, sleeps):
    image = tmp_path / "block.qcow2"
    image.write_bytes(b"QFI\xfb" + bytes(600))
    with pytest.raises(BackupError, match="block"):
        qemu.run("resize", "-q", "-f", "qcow2", str(image), "1M")
    with pytest.raises(BackupError, match="block"):
        qemu.Server(str(image), alone=True, read_only=True)
    assert 0.2 not in sleeps  # of the wait for a lock; subprocess has shorter ones


def test_an_image_that_is_locked_is_waited_for(tmp_path, sleeps):
    image = str(tmp_path / "image.qcow2")
    qemu.create(image, 1 << 20)
    with qemu.Server(image), pytest.raises(BackupError, match=qemu.LOCKED):
        qemu.run("resize", "-q", "-f", "qcow2", image, "2M")
    assert 15 <= sum(sleeps) + 0.1
