"""What one point has over the point below, as bytes: the reading half of restore and verify.

Where QEMU keeps data as it is we read it from the file; what is compressed or encrypted comes
from a qemu-nbd, which starts when the first of it is asked for.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Literal, NamedTuple, TypeVar

from ..errors import BackupError, KeyRefused, SnapfsError
from . import qemu
from .extents import Range
from .keys import Key
from .nbd import NbdClient
from .qcow2 import Extent, Kind, Qcow2File
from .sums import UNIT_BYTES

READERS = 4  # requests at once: two processors, and the disk, have something to do then

T = TypeVar("T")
R = TypeVar("R")


class Located(NamedTuple):
    """Bytes [start, stop) of a layer: pieces without a gap, and the file that has each."""

    start: int
    stop: int
    parts: tuple[tuple[Extent, Qcow2File], ...]


class Layer:
    """Some qcow2 files of one directory, the topmost first, without what is below them.

    What they do not have reads as zeros.  A context manager.
    """

    def __init__(self, paths: Sequence[str], key: Key | None = None) -> None:
        """Raises OSError, BackupError if one is no qcow2 file, KeyRefused if it takes a key."""
        self._paths = paths
        self._key = key
        self._files: list[Qcow2File] = []
        self._lock = threading.Lock()  # protects what follows
        self._server: qemu.Server | None = None
        self._idle: list[NbdClient] = []  # connections of the server: one for each reader
        self._broken: SnapfsError | None = None
        try:
            for path in paths:
                self._files.append(Qcow2File(path))
                if self._files[-1].encrypted and key is None:
                    raise KeyRefused(f"{path} is encrypted; give its --key-file")
        except BaseException:
            self.close()
            raise
        self._plain = all(file.plain for file in self._files)

    @property
    def size(self) -> int:
        """Bytes of the topmost file."""
        return self._files[0].size

    @property
    def backing(self) -> str | None:
        """The name of the file below the topmost, as it is stored in it."""
        return self._files[0].backing

    def locate(self, start: int, stop: int) -> Located:
        """Where bytes are, to be read by any thread.  Only for the thread that opened the layer.

        Raises OSError, SnapfsError.
        """
        if self._plain:
            parts = tuple(self._find(start, stop))
        else:
            parts = ((Extent(start, stop, Kind.CODED), self._files[0]),)
        if any(extent.kind is Kind.CODED for extent, _ in parts):
            self._start()
        return Located(start, stop, parts)

    def read(self, located: Located, view: memoryview) -> None:
        """Fill `view` with these bytes.  Raises OSError, BackupError."""
        try:
            for extent, file in located.parts:
                part = view[extent.start - located.start : extent.stop - located.start]
                if extent.kind is Kind.CODED:
                    self._ask(part, extent.start)
                elif extent.kind is Kind.PLAIN:
                    file.read(part, extent.host)
                else:
                    part[:] = bytes(len(part))
        except OSError as error:
            if error.filename is None:
                error.filename = self._paths[0]
            raise

    def content(self, start: int, stop: int) -> bytearray:
        """Some bytes at once, for the thread that opened the layer."""
        data = bytearray(stop - start)
        with memoryview(data) as view:
            self.read(self.locate(start, stop), view)
        return data

    def _find(self, start: int, stop: int, depth: int = 0) -> Iterator[tuple[Extent, Qcow2File]]:
        """What there is of a range, and in which file."""
        file = self._files[depth]
        end = start
        for each in file.extents(start, stop):
            if each.kind is Kind.ABSENT and depth + 1 < len(self._files):
                yield from self._find(each.start, each.stop, depth + 1)
            else:
                yield each, file
            end = each.stop
        if end < stop:
            yield Extent(end, stop, Kind.ABSENT), file

    def spans(self) -> Iterator[tuple[Range, bool]]:
        """Ascending, what the files have themselves: (start, stop), and is it zeros."""
        if not self._plain:
            for each in qemu.layer_map(*self._paths, key=self._key):
                yield (each["start"], each["start"] + each["length"]), each["zero"]
            return
        for extent, _ in self._find(0, self.size):
            if extent.kind is not Kind.ABSENT:
                yield (extent.start, extent.stop), extent.kind is Kind.ZERO

    def _start(self) -> None:
        """Have a server.  Here: it ends with the thread that starts it."""
        if self._broken is not None:
            raise self._broken
        if self._server is None:
            try:
                self._server = qemu.Server(
                    *self._paths,
                    alone=True,
                    read_only=True,
                    connections=READERS,
                    key=self._key,
                )
            except SnapfsError as error:
                self._broken = error
                raise
            self._idle = list(self._server.clients)

    def _ask(self, view: memoryview, start: int) -> None:
        with self._lock:
            server = self._server
            if server is None:
                raise BackupError(f"{self._paths[0]} could not be read before")
            client = self._idle.pop()
        try:
            client.read_into(view, start)
        except (OSError, BackupError) as error:
            # QEMU reads nothing more from an image that it found damaged: the next one may.
            self._end(server)
            raise BackupError(f"{self._paths[0]}: {error}") from None
        with self._lock:
            if server is self._server:
                self._idle.append(client)

    def _end(self, server: qemu.Server) -> None:
        with self._lock:
            if server is not self._server:
                return
            self._server = None
        with suppress(SnapfsError, OSError):
            server.abandon()

    def close(self) -> None:
        """Close the files, and end the server if there is one; nobody reads any more."""
        if self._server is not None:
            self._end(self._server)
        for file in self._files:
            file.close()

    def __enter__(self) -> Layer:
        return self

    def __exit__(self, *_exception: object) -> Literal[False]:
        self.close()
        return False


_scratch = threading.local()


def scratch(length: int) -> memoryview:
    """At most UNIT_BYTES to read into, the same ones each time that this thread asks."""
    if not hasattr(_scratch, "view"):
        _scratch.view = memoryview(bytearray(UNIT_BYTES))
    view: memoryview = _scratch.view
    return view[:length]


def in_turn(work: Callable[[T], R], items: Iterable[tuple[T, int]]) -> Iterator[R]:
    """The results of `work` for each of `items`, in their order, some of them at work at once.

    The items come with the bytes that they are: small ones are done together.
    Raises what `work` raises, when nothing is at work any more.
    """

    def work_on(batch: list[T]) -> list[R]:
        return [work(each) for each in batch]

    batches = _batches(items)
    first = list(itertools.islice(batches, 2))
    if len(first) < 2:  # no work for two
        for batch in first:
            yield from work_on(batch)
        return
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[Future[list[R]]] = deque()
        try:
            for batch in itertools.chain(first, batches):
                waiting.append(pool.submit(work_on, batch))
                if len(waiting) >= 2 * READERS:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for each in waiting:
                each.cancel()


def _batches(items: Iterable[tuple[T, int]]) -> Iterator[list[T]]:
    batch: list[T] = []
    size = 0
    for item, length in items:
        batch.append(item)
        size += length
        if size >= UNIT_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
