"""One layer: what a snapshot owns, and what outlives it for older ones.

A layer is *live* while its snapshot is wanted: it has a name, or somebody
still holds its file open after it was deleted.  A layer that is not live has
no access left; it stays, nameless, only while older snapshots find old data in
its temp image.
"""

from __future__ import annotations

import struct
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from attrs import define, field, frozen
from bitarray import bitarray

from ..errors import InvalidName, NameTooLong, UsageError
from ..storage.image import Image
from .bitmap import Bitmap
from .dirty import BitmapRecord, BitmapStore
from .durability import Commits
from .geometry import Geometry

State = Literal["ok", "incomplete", "lost"]
Policy = Literal["break-snapshot", "break-guest-write"]

MAX_NAME_BYTES = 255  # NAME_MAX of Linux
MAX_NOTE_BYTES = 255  # the list has one of each snapshot, and is bounded (manifest.py)

# Clusters lost, or -1 less those if the snapshot is lost as a whole; errno, since_ns, reason in
# UTF-8.  The rest means something only if the first is not 0: it is stored before, once, and the
# first by one store of 8 bytes.  So a record that was being changed when the daemon died is the
# one before or the one after.
_LOSSES = struct.Struct("=qqq232s")
_LOST = struct.Struct("=q")
LOSSES_BYTES = _LOSSES.size


def check_name(name: str) -> str:
    """Return `name` if it can be a snapshot's or bitmap's file name, else raise InvalidName."""
    if name in ("", ".", ".."):
        raise InvalidName(f"{name!r} cannot be the name of a snapshot or bitmap")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise InvalidName("the name must be valid UTF-8") from None
    if size > MAX_NAME_BYTES:
        raise NameTooLong(f"the name has {size} bytes; at most {MAX_NAME_BYTES} are allowed")
    if "/" in name or any(unicodedata.category(letter) == "Cc" for letter in name):
        raise InvalidName(f"{name!r} has a slash or a control character")
    return name


def check_note(note: str) -> str:
    """Return `note` if it can be a snapshot's, else raise UsageError."""
    try:
        size = len(note.encode())
    except UnicodeEncodeError:
        raise UsageError("the note must be valid UTF-8") from None
    if size > MAX_NOTE_BYTES:
        raise UsageError(f"the note has {size} bytes; at most {MAX_NOTE_BYTES} are allowed")
    if any(unicodedata.category(letter) == "Cc" for letter in note):
        raise UsageError("the note has a control character; it is one line of text")
    return note


@frozen
class LayerRecord:
    """What the state directory keeps of a layer besides its files.

    Counts are clusters, `size` bytes, `blocks` 512-byte units, `created_ns`
    nanoseconds since 1970.
    """

    id: int
    name: str | None
    created_ns: int
    size: int
    state: State = "ok"
    reason: str | None = None
    errno: int | None = None
    lost: int = 0
    since_ns: int | None = None  # when the state stopped being ok
    granted: int = 0
    blocks: int = 0
    bitmap: str | None = None
    policy: Policy | None = None
    temp_dir: str | None = None  # of the temp image, None: in the state directory
    note: str | None = None
    pinned: bool = False


@frozen
class LayerParts:
    """The files of a layer.

    `losses`: a writable buffer of LOSSES_BYTES, which outlives the daemon as
    the bitmaps do: a snapshot that lost clusters must not seem whole.
    `commits`: None if they need not survive a power cut.  `failure`: what of the
    bitmaps and that record could not be written back since the last call; does not block.
    """

    access: Bitmap
    done: Bitmap
    temp: Image
    losses: Any = field(factory=lambda: bytearray(LOSSES_BYTES))
    commits: Commits | None = None
    failure: Callable[[], OSError | None] = lambda: None


@define(eq=False)
class Layer:
    """A snapshot, or what is left of one.

    All fields but the first group change only in plain `def` functions of the
    trio thread (task-atomic).
    """

    # Set in the constructor.
    id: int
    geometry: Geometry
    access: Bitmap  # set: readers may read the cluster.  Bits are only ever cleared
    done: Bitmap  # set: the old data is in temp (a hole there: zeros)
    temp: Image
    losses: Any  # see LayerParts
    commits: Commits | None = None
    failure: Callable[[], OSError | None] = lambda: None  # see LayerParts
    created_ns: int = 0
    granted: int = 0  # accessible clusters at creation
    blocks: int = 0  # st_blocks of the image at creation
    bitmap: str | None = None  # the dirty bitmap that gave access, None: all
    policy: Policy | None = None  # None: that of the mount

    name: str | None = None
    note: str | None = None  # what its user says of it
    pinned: bool = False  # it is neither deleted nor discarded
    state: State = "ok"
    reason: str | None = None
    errno: int | None = None
    lost: int = 0  # clusters that could not be kept
    since_ns: int | None = None

    live: bool = True
    visible: bool = True  # False until the state directory knows it
    settled: bool = False  # what it finds in the image was durable after its moment
    openers: int = 0  # open file handles
    pins: int = 0  # I/O in flight on temp: it must not be closed
    temp_bytes: int = 0  # space that temp took when its storage was asked last (space.py)
    removed: bool = False  # out of the stack for good; its files go when pins is 0
    _accessible: int | None = field(default=None, init=False)  # cached count
    _copied: tuple[int, int] | None = field(default=None, init=False)  # changes of done, and count
    _record: LayerRecord | None = field(default=None, init=False)  # the newest, and what
    _recorded: tuple[object, ...] = field(default=(), init=False)  # it was made of

    @classmethod
    def from_record(cls, record: LayerRecord, parts: LayerParts, cluster_size: int) -> Layer:
        """The layer as the state directory kept it."""
        layer = cls(
            id=record.id,
            geometry=Geometry(record.size, cluster_size),
            access=parts.access,
            done=parts.done,
            temp=parts.temp,
            losses=parts.losses,
            commits=parts.commits,
            failure=parts.failure,
            created_ns=record.created_ns,
            granted=record.granted,
            blocks=record.blocks,
            bitmap=record.bitmap,
            policy=record.policy,
            name=record.name,
            note=record.note,
            pinned=record.pinned,
            state=record.state,
            reason=record.reason,
            errno=record.errno,
            lost=record.lost,
            since_ns=record.since_ns,
            live=record.name is not None,
        )
        lost, number, since, reason = _LOSSES.unpack_from(parts.losses)
        all_lost, lost = lost < 0, -1 - lost if lost < 0 else lost
        text = reason.rstrip(b"\0").decode(errors="replace")
        if lost > layer.lost:  # after the list was saved
            layer.lost = lost
            if layer.state == "ok":
                layer.degrade("incomplete", text, number or None)
                layer.since_ns = since
        if all_lost and layer.state != "lost":
            layer.degrade("lost", text, number or None)
            layer.since_ns = since
            layer.withdraw(0, layer.geometry.clusters)
        return layer

    def record(self) -> LayerRecord:
        """What the state directory keeps; the same object as before while nothing has changed."""
        now = (
            self.name, self.created_ns, self.state, self.reason, self.errno, self.lost,
            self.since_ns, self.granted, self.blocks, self.bitmap, self.policy,
            self.note, self.pinned,
        )  # fmt: skip
        if self._record is None or now != self._recorded:
            self._recorded = now
            self._record = LayerRecord(
                id=self.id,
                name=self.name,
                created_ns=self.created_ns,
                size=self.geometry.size,
                state=self.state,
                reason=self.reason,
                errno=self.errno,
                lost=self.lost,
                since_ns=self.since_ns,
                granted=self.granted,
                blocks=self.blocks,
                bitmap=self.bitmap,
                policy=self.policy,
                note=self.note,
                pinned=self.pinned,
            )
        return self._record

    def degrade(self, state: State, reason: str, number: int | None = None) -> None:
        """Note why the snapshot is incomplete or lost; `number`: the errno."""
        self.state, self.reason, self.errno = state, reason, number
        self.since_ns = time.time_ns()

    def lose(self, clusters: int, reason: str, number: int | None) -> None:
        """Note that clusters could not be kept; to be called before access to them goes."""
        self.lost += clusters
        if self.state == "ok":
            self.degrade("incomplete", reason, number)
        self._keep_losses()

    def lose_all(self, reason: str, number: int | None) -> None:
        """Note that it cannot be read any more; access is to be withdrawn after that."""
        self.degrade("lost", reason, number)
        self._keep_losses()

    def _keep_losses(self) -> None:
        words = memoryview(self.losses)[: _LOST.size].cast("q")
        if not words[0]:
            text = (self.reason or "").encode()[:232]
            details = _LOSSES.pack(0, self.errno or 0, self.since_ns or 0, text)
            self.losses[_LOST.size :] = details[_LOST.size :]
        words[0] = -1 - self.lost if self.state == "lost" else self.lost

    def withdraw(self, first: int, stop: int) -> bitarray:
        """Clear access to [first, stop); readers get AccessDenied from now on.

        Returns the bits that it had there.
        """
        before = self.access.slice(first, stop)
        self.access.clear(first, stop)
        self._accessible = None
        return before

    def restrict(self, bits: bitarray, bitmap: str | None) -> None:
        """Give access to these clusters only, before anybody has any; `bitmap` named them."""
        self.access.assign(0, bits)
        self._accessible = None
        self.granted = self.accessible
        self.bitmap = bitmap

    def is_empty(self) -> bool:
        """Does the temp image hold nothing that a snapshot finds there?"""
        return not self.done.any(0, len(self.done))

    @property
    def accessible(self) -> int:
        """Number of clusters that may be read."""
        if self._accessible is None:
            self._accessible = self.access.count()
        return self._accessible

    def copied(self, receiving: bool) -> int:
        """Number of clusters whose old data is in its temp image.

        Kept for as long as nothing changes; not while it is `receiving` copies, which native
        code makes, and `received_all` ends.
        """
        if receiving:
            return self.done.count()
        if self._copied is None or self._copied[0] != self.done.changes:
            self._copied = self.done.changes, self.done.count()
        return self._copied[1]

    def received_all(self) -> None:
        """A newer layer receives copies from now on."""
        self._copied = None

    def stat_blocks(self) -> int:
        """st_blocks of the snapshot's file: what data a reader finds, about.

        The image's own blocks at creation, and every inaccessible cluster
        counts as data.  Never 0 for a size above 0: GNU tar -S stores a file
        without blocks as all zeros without reading it.
        """
        full = -(-self.geometry.size // 512)
        hidden = (self.geometry.clusters - self.accessible) * self.geometry.cluster_size // 512
        return min(full, max(1, self.blocks + hidden))


class LayerStore(Protocol):
    """Where layers are kept: the state directory, or memory in tests."""

    @property
    def bitmaps(self) -> BitmapStore:
        """Where dirty bitmaps are kept."""

    async def create(self, layer_id: int, geometry: Geometry) -> LayerParts:
        """Make the files of a layer: all bits clear, an empty temp image of that size.

        On failure (OSError) nothing is left behind.
        """

    async def save(
        self,
        records: Sequence[LayerRecord],
        geometry: Geometry,
        bitmaps: Sequence[BitmapRecord] = (),
    ) -> None:
        """Replace the lists of layers (oldest first) and bitmaps, atomically and durably.

        `geometry` is that of the image now.  After a crash either the old or
        the new list is found.
        """

    async def sync(self, layer_id: int) -> None:
        """Make the files of a layer durable; OSError also if they could not be written back
        at some time before."""

    async def take_errors(self) -> None:
        """Have the file systems say that they could not store something.

        They say it once, and would say it to the next mount.  So it is kept for that, until
        `errors_saved`.  Files are to be asked after that.
        """

    def errors_saved(self) -> None:
        """What could not be stored is lost by the saved list."""

    async def remove(self, layer_id: int) -> None:
        """Close the temp image of a layer that is in no saved list, and remove its files.

        Idempotent.
        """

    async def usage(self, temps: Sequence[Image]) -> tuple[list[int], int]:
        """Bytes that each of these temp images takes, and that are free for them; OSError.

        The caller keeps them open meanwhile.
        """

    def failures(self) -> int:
        """How many pages of all mapped bits have failed, since the process began.

        Such a page is in memory only, and may have lost what it had; whose it is
        `LayerParts.failure` and `DirtyParts.failure` tell, once.
        """

    def write_started(self, size: int) -> None:
        """A change of the image begins that may leave it with `size` bytes."""

    def write_finished(self) -> None:
        """A change of the image that `write_started` announced has ended."""
