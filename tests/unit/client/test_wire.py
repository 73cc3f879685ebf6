"""Who is taken for a daemon, and what is made of what it says or does not say."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snapfs import errors
from snapfs.client import wire
from snapfs.client.mountinfo import Mount
from snapfs.client.wire import Client, RemoteError

DEVICE = "0:999999"  # nobody has so many


def mount_of(user: int) -> Mount:
    return Mount(1, 0, DEVICE, "/", "/mnt", "fuse.snapfs", "image", user)


@contextmanager
def answering(
    directory: Path, monkeypatch: pytest.MonkeyPatch, answer: Callable[[socket.socket], object]
) -> Iterator[None]:
    """Somebody of our user listens in a state directory, and does this with one who connects."""
    monkeypatch.setattr(wire, "_ask_mount", lambda _mount: os.fsencode(directory))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / wire.SOCKET_NAME))
        listener.listen()

        def serve() -> None:
            connected, _ = listener.accept()
            with connected:
                answer(connected)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            thread.join()


def test_who_is_not_the_user_of_the_mount_is_no_daemon_of_it(tmp_path, monkeypatch):
    with answering(tmp_path, monkeypatch, lambda connected: connected.recv(1)):
        with pytest.raises(errors.NotMounted, match=f"of user {os.geteuid()}, not of 12345"):
            Client(mount_of(12345))


def test_why_one_is_refused_is_heard_though_nobody_listens_any_more(tmp_path, monkeypatch):
    refusal = {"ok": False, "error": {"message": "not you", "exit_code": 1}}
    closed = threading.Event()

    def refuse(connected: socket.socket) -> None:
        connected.sendall(json.dumps(refusal).encode() + b"\n")
        connected.close()
        closed.set()

    with answering(tmp_path, monkeypatch, refuse), Client(mount_of(os.geteuid())) as client:
        closed.wait()
        with pytest.raises(RemoteError, match="not you"):
            client.call("list")


def test_who_says_a_little_now_and_then_has_not_answered_in_time(tmp_path, monkeypatch):
    gone = threading.Event()

    def drip(connected: socket.socket) -> None:
        while not gone.wait(0.01):
            connected.sendall(b" ")

    with answering(tmp_path, monkeypatch, drip), Client(mount_of(os.geteuid())) as client:
        try:
            assert not client.answers(0.2)
        finally:
            gone.set()


@pytest.mark.parametrize(
    "text", [b"\xff", b"[" * 100_000, b"[]", b"1", b"{}", b'{"ok": true}', b'{"ok": 0}',
             b'{"ok": false, "error": {"message": 1, "exit_code": "x"}}'],
)  # fmt: skip
def test_an_answer_that_is_none_is_told_in_words(tmp_path, monkeypatch, text):
    with answering(tmp_path, monkeypatch, lambda connected: connected.sendall(text + b"\n")):
        with Client(mount_of(os.geteuid())) as client:
            with pytest.raises(errors.NotMounted, match="no snapfs"):
                client.call("list")
