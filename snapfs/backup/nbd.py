"""An NBD client on a connected socket: what it takes to read and write an image.

The protocol is that of https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md;
fixed newstyle handshake, simple replies.  Writes are on their way while the caller
goes on; every other request waits for them, and then for itself.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Literal

from ..errors import BackupError

MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
ANSWER_MAGIC = 0x67446698

FIXED_NEWSTYLE = 1
OPT_GO = 7
REP_ACK = 1
REP_INFO = 3
INFO_EXPORT = 0

CMD_READ, CMD_WRITE, CMD_DISCONNECT, CMD_FLUSH, CMD_WRITE_ZEROES = 0, 1, 2, 3, 6
HAS_FLUSH, HAS_WRITE_ZEROES = 1 << 2, 1 << 6

MAX_REQUEST = 16 << 20  # bytes of data; servers allow 32 MiB
MAX_ZEROES = 1 << 30
MAX_WRITES = 8  # on their way; their answers fit into any socket's buffer, so none blocks

# The protocol's own error numbers, which happen to be those of Linux.
_KNOWN = (errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC)


class NbdClient:
    """One export of a server.  `size` in bytes; offsets and lengths stay inside it."""

    def __init__(self, connection: socket.socket) -> None:
        """Shake hands; raises ConnectionError or BackupError if the server does not go on."""
        self._socket = connection
        self._handle = 0
        self._writes: set[int] = set()  # handles of writes that are not answered yet
        self.size, self._flags = self._shake_hands()

    def _shake_hands(self) -> tuple[int, int]:
        if self._receive(16) != MAGIC + OPTION_MAGIC:
            raise BackupError("the NBD server does not speak the newstyle protocol")
        (flags,) = struct.unpack(">H", self._receive(2))
        self._socket.sendall(struct.pack(">I", flags & FIXED_NEWSTYLE))
        # The export with the empty name, no particular information asked for.
        payload = struct.pack(">IH", 0, 0)
        self._socket.sendall(OPTION_MAGIC + struct.pack(">II", OPT_GO, len(payload)) + payload)
        export: tuple[int, int] | None = None
        while True:
            magic, _option, kind, length = struct.unpack(">QIII", self._receive(20))
            data = self._receive(length)
            if magic != REPLY_MAGIC:
                raise BackupError("the NBD server's answer is not one")
            if kind == REP_ACK and export is not None:
                return export
            if kind == REP_INFO and struct.unpack(">H", data[:2])[0] == INFO_EXPORT:
                export = struct.unpack(">QH", data[2:12])
            elif kind != REP_INFO:
                reason = data.decode(errors="replace")
                raise BackupError(f"the NBD server refuses the export: {reason or hex(kind)}")

    def _receive(self, length: int) -> bytearray:
        buffer = bytearray(length)
        self._receive_into(memoryview(buffer))
        return buffer

    def _receive_into(self, view: memoryview) -> None:
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionResetError(errno.ECONNRESET, "the NBD server went away")
            view = view[count:]

    def _send(
        self, command: int, offset: int, length: int, data: bytes | bytearray | memoryview = b""
    ) -> int:
        self._handle += 1
        head = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, command, self._handle, offset, length)
        self._socket.sendall(head)
        if data:
            self._socket.sendall(data)
        return self._handle

    def _answer(self, expected: set[int]) -> None:
        """Receive the answer to one of the requests and take it out; raises OSError if it failed.

        They come in any order.
        """
        magic, error, handle = struct.unpack(">IIQ", self._receive(16))
        if magic != ANSWER_MAGIC or handle not in expected:
            raise BackupError("the NBD server's answer is not one")
        expected.remove(handle)
        if error:
            number = error if error in _KNOWN else errno.EIO
            raise OSError(number, os.strerror(number))

    def _request(self, command: int, offset: int = 0, length: int = 0) -> None:
        self.settle()
        self._answer({self._send(command, offset, length)})

    def settle(self) -> None:
        """Return when all writes are answered; raises OSError if one failed."""
        while self._writes:
            self._answer(self._writes)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view`, which is at most MAX_REQUEST bytes."""
        self._request(CMD_READ, offset, len(view))
        self._receive_into(view)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data`, at most MAX_REQUEST bytes; at the latest `flush` raises."""
        while len(self._writes) >= MAX_WRITES:
            self._answer(self._writes)
        self._writes.add(self._send(CMD_WRITE, offset, len(data), data))

    def zero(self, offset: int, length: int) -> None:
        """Have a range read as zeros, whatever a backing file has there; no space if possible."""
        if not self._flags & HAS_WRITE_ZEROES:
            raise BackupError("the NBD server cannot write zeros; it is too old")
        while length:
            step = min(length, MAX_ZEROES)
            self._request(CMD_WRITE_ZEROES, offset, step)
            offset, length = offset + step, length - step

    def flush(self) -> None:
        """Return when all that was written is durable."""
        if not self._flags & HAS_FLUSH:
            raise BackupError("the NBD server cannot flush")
        self._request(CMD_FLUSH)

    def close(self) -> None:
        """Say goodbye; what is not flushed may be written later."""
        try:
            head = struct.pack(">IHHQQI", REQUEST_MAGIC, 0, CMD_DISCONNECT, 0, 0, 0)
            self._socket.sendall(head)
        except OSError:
            pass  # it is gone already
        self._socket.close()

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, *_exception: object) -> Literal[False]:
        self.close()
        return False
