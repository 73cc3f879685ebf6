"""Telling systemd: whoever is told may not listen, and the mount goes on."""

from __future__ import annotations

import socket
import threading
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from snapfs.daemon import sdnotify
from tests.support.mounted import PATIENCE


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """The socket of a service manager that reads nothing of itself."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as made:
        made.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield made


def fill(manager):
    """Messages until there is room for no more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        while True:
            try:
                sender.sendto(b"x", manager.getsockname())
            except BlockingIOError:
                return


def heard(manager):
    """All that came, without what `fill` sent."""
    found = []
    while True:
        try:
            found.append(manager.recv(4096).decode())
        except BlockingIOError:
            return [each for each in found if each != "x"]


def engine():
    """As much of one as has a status."""
    space = SimpleNamespace(status=lambda: SimpleNamespace(used=0, limit=None))
    return SimpleNamespace(snapshots=[], space=space, unhealthy=None)


def test_a_manager_that_does_not_listen_holds_nobody_up(manager):
    fill(manager)
    said = threading.Thread(target=sdnotify.notify, args=("STATUS=x",), daemon=True)
    said.start()
    said.join(PATIENCE)
    assert not said.is_alive(), "the trio thread would wait as long, and all who use the mount"


async def test_what_could_not_be_said_is_said_later(manager, autojump_clock):
    fill(manager)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sdnotify.tell_ready)
        nursery.start_soon(sdnotify.tell_status, "disk.img", engine())
        await trio.sleep(3 * sdnotify.STATUS_SECONDS)
        assert [] == heard(manager)
        await trio.sleep(3 * sdnotify.STATUS_SECONDS)
        assert [
            "READY=1", "STATUS=serving disk.img; 0 snapshots; 0 B of temp space",
        ] == sorted(heard(manager)), "each of them once"  # fmt: skip
        nursery.cancel_scope.cancel()


async def test_who_is_not_asked_says_nothing(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    await sdnotify.tell_ready()
    await sdnotify.tell_status("disk.img", engine())
