"""Who is taken for a daemon, and what is made of what it says or does not say."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from snapfs import errors
from snapfs.client import wire
from snapfs.client.mountinfo import Mount
from snapfs.client.wire import Client, RemoteError
from tests.support.mounted import PATIENCE

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


def test_who_accepts_nobody_does_not_keep_us_for_ever(tmp_path, monkeypatch):
    """An ordinary user may listen at a place of theirs, and root asks all mounts."""
    monkeypatch.setattr(wire, "ASK_SECONDS", 1)
    monkeypatch.setattr(wire, "_ask_mount", lambda _mount: os.fsencode(tmp_path))
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as waiting:
        listener.bind(str(tmp_path / wire.SOCKET_NAME))
        listener.listen(0)
        while True:
            one = waiting.enter_context(
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            )
            try:
                one.connect(listener.getsockname())
            except BlockingIOError:
                break
        heard: list[BaseException] = []

        def ask() -> None:
            try:
                Client(mount_of(os.geteuid()))
            except errors.NotMounted as error:
                heard.append(error)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(PATIENCE)
        assert 1 == len(heard)
        assert "too many clients" in str(heard[0])


def test_who_never_ends_an_answer_does_not_fill_our_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(wire, "MAX_ANSWER", 10 << 20)

    def talk(connected: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connected.sendall(bytes(1 << 20))

    with answering(tmp_path, monkeypatch, talk), Client(mount_of(os.geteuid())) as client:
        with pytest.raises(errors.NotMounted, match="too much"):
            client.call("list")
