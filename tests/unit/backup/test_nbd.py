"""The NBD client, against a server that answers in an order of its own."""

from __future__ import annotations

import errno
import socket
import struct
import threading

import pytest

from snapfs.backup import nbd
from snapfs.backup.nbd import NbdClient


class Server(threading.Thread):
    """Answers writes when `window` of them wait, the newest first; those in `failing` fail."""

    def __init__(self, connection: socket.socket, window: int, failing: frozenset[int]) -> None:
        super().__init__()
        self._connection = connection
        self._window = window
        self._failing = failing  # handles
        self.requests: list[tuple[int, int, bytes]] = []
        self.most = 0  # requests that waited at once

    def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self._connection.recv(length - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def run(self) -> None:
        send = self._connection.sendall
        send(nbd.MAGIC + nbd.OPTION_MAGIC + struct.pack(">H", nbd.FIXED_NEWSTYLE))
        self._read(4 + 8 + 8 + 6)
        flags = nbd.HAS_FLUSH | nbd.HAS_WRITE_ZEROES
        info = struct.pack(">HQH", nbd.INFO_EXPORT, 1 << 20, flags)
        for kind, data in ((nbd.REP_INFO, info), (nbd.REP_ACK, b"")):
            send(struct.pack(">QIII", nbd.REPLY_MAGIC, nbd.OPT_GO, kind, len(data)) + data)
        waiting: list[int] = []
        try:
            while True:
                head = self._read(28)
                _, _, command, handle, offset, length = struct.unpack(">IHHQQI", head)
                if command == nbd.CMD_DISCONNECT:
                    return
                data = self._read(length) if command == nbd.CMD_WRITE else b""
                self.requests.append((command, offset, data))
                waiting.append(handle)
                self.most = max(self.most, len(waiting))
                if command != nbd.CMD_WRITE or len(waiting) == self._window:
                    for each in reversed(waiting):  # the newest first
                        error = errno.ENOSPC if each in self._failing else 0
                        send(struct.pack(">IIQ", nbd.ANSWER_MAGIC, error, each))
                    waiting.clear()
        except EOFError:
            return


@pytest.fixture
def connected():
    made = []

    def connect(window: int = nbd.MAX_WRITES, *failing: int) -> tuple[NbdClient, Server]:
        ours, theirs = socket.socketpair()
        server = Server(theirs, window, frozenset(failing))
        server.start()
        made.append((ours, theirs, server))
        return NbdClient(ours), server

    yield connect
    for ours, theirs, server in made:
        ours.close()
        server.join()
        theirs.close()


def test_writes_are_on_their_way_together_and_a_flush_waits_for_all(connected):
    client, server = connected(4)
    for number in range(20):
        client.write(number * 10, bytes([number]) * 10)
    client.flush()
    assert 4 == server.most
    written = [each for each in server.requests if each[0] == nbd.CMD_WRITE]
    assert [(nbd.CMD_WRITE, number * 10, bytes([number]) * 10) for number in range(20)] == written


@pytest.mark.parametrize("failing", range(1, 12))
def test_a_write_that_failed_is_known_when_the_flush_returns(connected, failing):
    client, _ = connected(1, failing)
    with pytest.raises(OSError) as caught:
        for number in range(11):
            client.write(number * 10, b"0123456789")
        client.flush()
    assert errno.ENOSPC == caught.value.errno
    client.flush()  # the connection is still good


def test_a_request_waits_for_the_writes_before_it(connected):
    client, server = connected(1)
    client.write(0, b"x")
    client.zero(100, 5)
    client.flush()
    assert [nbd.CMD_WRITE, nbd.CMD_WRITE_ZEROES, nbd.CMD_FLUSH] == [
        command for command, _, _ in server.requests
    ]
