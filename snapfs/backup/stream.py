"""The stream of `snapfs send`: a snapshot, or what changed up to it, for a pipe.

    snapfs stream 1\\n         16 bytes
    records, each of          kind (4 bytes), length of the payload (4), offset (8), length (8),
                              the payload, a digest (16); numbers big-endian

    HEAD   first: the payload is JSON, see Header
    DATA   the payload is what is at [offset, offset + length)
    ZERO   zeros are at [offset, offset + length)
    DONE   last: the payload is JSON, see Totals

Offsets ascend and do not overlap.  What is in no record is as at the base, or, without a base,
nowhere: then there is none.  The digest, XXH3-128, is of the digest before, kind, numbers and
payload, so that no record can be changed, missing, twice or in another place without a mark.
It is no defence against somebody who forges a stream: ssh(1) is.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO, NamedTuple

import xxhash
from attrs import evolve, field, frozen
from attrs.validators import ge

from ..errors import BackupError, StreamBroken
from . import records
from .moments import Moment
from .plan import pieces
from .sums import UNIT_BYTES
from .targets import Data

VERSION = 1
MAGIC = b"snapfs stream %d\n" % VERSION
MAX_JSON = 64 << 10
PIPE_BYTES = 1 << 20  # what an ordinary user may have, pipe(7)
_HEAD = struct.Struct(">4sIQQ")
_DIGEST_BYTES = 16


@frozen
class Header:
    """What a stream is of.  `base`: what it changes, None: nothing, it has everything.

    `start`: bytes before it are left out, as somebody has them already.  `data_bytes`: of DATA,
    at most.  `image`, `host`, `snapshot`: for people.
    """

    version: int
    image: str
    host: str
    snapshot: str
    moment: Moment
    size: int = field(validator=ge(0))
    start: int = field(validator=ge(0))
    data_bytes: int = field(validator=ge(0))
    base: Moment | None = None

    def __attrs_post_init__(self) -> None:
        if self.moment.size != self.size or self.start > self.size:
            raise ValueError("its sizes contradict each other")


@frozen
class Totals:
    """Bytes and number of all records, HEAD and DONE not counted."""

    version: int
    records: int = 0
    data_bytes: int = 0
    zero_bytes: int = 0

    def with_record(self, record: Record) -> Totals:
        """With one more."""
        data = record.length if record.kind == b"DATA" else 0
        return evolve(
            self,
            records=self.records + 1,
            data_bytes=self.data_bytes + data,
            zero_bytes=self.zero_bytes + record.length - data,
        )


records.register(Header, Totals)


class Record(NamedTuple):
    """DATA or ZERO; `data` is empty for zeros."""

    kind: bytes
    offset: int
    length: int
    data: Data

    @property
    def stop(self) -> int:
        """End, exclusive."""
        return self.offset + self.length


def _digest(before: bytes, head: bytes, payload: Data) -> bytes:
    state = xxhash.xxh3_128(before)
    state.update(head)
    state.update(payload)
    return state.digest()


def widen(fd: int) -> None:
    """Let a pipe hold more, if it is one and may: each end then waits less for the other."""
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


class StreamTarget:
    """A stream as the target of a copy, on a descriptor.  Raises OSError, or BackupError if
    nobody reads any more.
    """

    def __init__(self, fd: int, header: Header) -> None:
        """Write the head."""
        widen(fd)
        self._fd = fd
        self._digest = xxhash.xxh3_128_digest(MAGIC)
        self._put([memoryview(MAGIC)])
        self._emit(b"HEAD", 0, 0, records.unstructure(header))
        self.totals = Totals(VERSION)

    def write(self, offset: int, data: Data) -> None:
        """See `Target`."""
        with memoryview(data) as view:
            for start, stop in pieces(0, len(view), UNIT_BYTES):
                self._add(Record(b"DATA", offset + start, stop - start, view[start:stop]))

    def zero(self, offset: int, length: int) -> None:
        """See `Target`."""
        self._add(Record(b"ZERO", offset, length, b""))

    def flush(self) -> None:
        """See `Target`; a pipe is not durable, whoever reads it knows what is."""

    def finish(self) -> None:
        """See `Target`: the end, by which a whole stream is told from one that was cut."""
        self._emit(b"DONE", 0, 0, records.unstructure(self.totals))

    def abandon(self) -> None:
        """See `Target`."""

    def _add(self, record: Record) -> None:
        self._emit(record.kind, record.offset, record.length, record.data)
        self.totals = self.totals.with_record(record)

    def _emit(self, kind: bytes, offset: int, length: int, payload: Data) -> None:
        head = _HEAD.pack(kind, len(payload), offset, length)
        self._digest = _digest(self._digest, head, payload)
        self._put([memoryview(head), memoryview(payload), memoryview(self._digest)])

    def _put(self, views: list[memoryview]) -> None:
        try:
            for view in views:
                while view:
                    view = view[os.write(self._fd, view) :]  # noqa: PLW2901
        except BrokenPipeError:
            raise BackupError(
                "whoever reads the stream went away; what has arrived is said there, by "
                "snapfs receive --state IMAGE"
            ) from None


class Reader:
    """A stream that comes in; nothing is given out that has not its digest."""

    def __init__(self, file: BinaryIO) -> None:
        """Read the head; raises StreamBroken."""
        self._file = file
        self._digest = xxhash.xxh3_128_digest(MAGIC)
        magic = file.read(len(MAGIC))
        if not magic:
            raise StreamBroken("no stream came; who sends it says why")
        if magic != MAGIC:
            newer = magic.startswith(b"snapfs stream")
            raise StreamBroken(
                "the stream is of another version of snapfs; use the same on both sides"
                if newer and len(magic) == len(MAGIC)
                else "what came is no stream of snapfs send"
            )
        kind, _, _, payload = self._next(0)
        if kind != b"HEAD":
            raise StreamBroken("the stream does not begin with its head")
        self.header = self._structure(payload, Header)

    def __iter__(self) -> Iterator[Record]:
        """All records, to the end of the stream; raises StreamBroken if there is none."""
        header = self.header
        position, totals = header.start, Totals(VERSION)
        while True:
            kind, offset, length, payload = self._next(position)
            if kind == b"DONE":
                break
            record = Record(kind, offset, length, payload)
            wanted = {b"DATA": length, b"ZERO": 0}.get(kind)
            whole = header.base is not None or offset == position
            if (
                wanted != len(payload)
                or not length
                or not whole
                or not position <= offset <= record.stop <= header.size
            ):
                raise StreamBroken(f"the stream has a record out of place at {offset}")
            totals = totals.with_record(record)
            position = record.stop
            yield record
        if self._structure(payload, Totals) != totals:
            raise StreamBroken("the stream ends with other totals than it had records")
        if header.base is None and position != header.size:
            raise StreamBroken(f"the stream ends at {position} of {header.size} bytes")

    def _structure(self, payload: Data, kind: type[records.T]) -> records.T:
        try:
            return records.structure(bytes(payload), kind, "the stream", VERSION)
        except BackupError as error:
            raise StreamBroken(str(error)) from None

    def _next(self, position: int) -> tuple[bytes, int, int, Data]:
        head = self._read(_HEAD.size, position)
        kind, size, offset, length = _HEAD.unpack(head)
        limit = UNIT_BYTES if kind == b"DATA" else MAX_JSON
        if kind not in (b"HEAD", b"DATA", b"ZERO", b"DONE") or size > limit:
            raise StreamBroken(f"the stream is damaged behind offset {position}")
        payload = self._read(size, position)
        digest = self._read(_DIGEST_BYTES, position)
        self._digest = _digest(self._digest, head, payload)
        if digest != self._digest:
            raise StreamBroken(f"the stream is damaged behind offset {position}")
        return kind, offset, length, payload

    def _read(self, length: int, position: int) -> bytes:
        data = self._file.read(length)
        if len(data) != length:
            raise StreamBroken(
                f"the stream was cut behind offset {position}; who sends it says why"
            )
        return data

    def is_at_end(self) -> bool:
        """Does nothing follow?  Waits for the other side to close the stream."""
        return not self._file.read(1)
