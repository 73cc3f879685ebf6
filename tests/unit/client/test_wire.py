"""The client side of the control socket, with a socket whose other end is the test's."""

from __future__ import annotations

import json
import socket

import pytest

from snapfs.client.wire import Client, RemoteError
from snapfs.errors import NotMounted


def connected() -> tuple[Client, socket.socket]:
    client = Client.__new__(Client)
    client._socket, server = socket.socketpair()
    client._answers = client._socket.makefile("rb")
    return client, server


def test_who_is_refused_before_the_request_hears_why():
    client, server = connected()
    error = {"kind": "LimitReached", "message": "no descriptors", "exit_code": 1}
    server.sendall(json.dumps({"ok": False, "error": error}).encode() + b"\n")
    server.close()
    with client, pytest.raises(RemoteError, match="no descriptors"):
        client.call("status")


def test_who_hears_nothing_is_told_so():
    client, server = connected()
    server.close()
    with client, pytest.raises(NotMounted, match="without an answer"):
        client.call("status")
