"""Open files of the mount, by number, and whether they use the kernel's page cache.

`active` is used through the page cache by all who have it open, or by none.
Without it (opened with O_DIRECT while nobody else has it open, as a virtual
machine does with cache=none) the kernel lets writes go side by side; otherwise
each holds the lock of the inode until it is answered, and one that waits for a
copy holds up all others.  Both at once would not be coherent: the kernel drops
cached pages before such a write, not after it, and a reader in between keeps
the old ones.  So who comes later does as those who are there.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict

from attrs import define

from ..engine.layer import Layer
from . import requestfilter
from .pagecache import PageCache

# Files that native code knows at a time, by the number modulo this (HANDLES in fastpath.c).
SLOTS = 4096


@define(eq=False)
class Handle:
    """An open file.  `layer` None: `active`, or a bitmap if there is `content`.

    `direct`: it bypasses the page cache.  `keep_cache`: what the page cache has
    of the file from before is true.  `writable`, `synchronous`: opened for writing,
    and with O_DSYNC or O_SYNC, which cannot be changed afterwards.
    """

    number: int
    inode: int
    layer: Layer | None
    own: bool  # opened by the daemon itself
    direct: bool
    keep_cache: bool
    writable: bool = False
    synchronous: bool = False
    creator: int | None = None  # the thread whose open(O_CREAT) made the snapshot
    content: bytes | None = None  # of a bitmap, at its open(2)


class Handles:
    """All open files of one mount.  Task-atomic.

    Anybody may have very many open: no method looks at all of them.
    """

    def __init__(self, page_cache: PageCache) -> None:
        self._page_cache = page_cache
        self._last = 0  # number that was given
        self._slots: Counter[int] = Counter()  # handles in each that is taken
        self._handles: dict[int, Handle] = {}
        self._of: defaultdict[int, dict[int, Handle]] = defaultdict(dict)  # by inode, not our own
        self._dirtying: Counter[int] = Counter()  # by inode: what `may_be_dirty` asks for
        self.readers = 0  # files of snapshots, and of `active` for reading, not our own
        self.writers = 0  # of `active` for writing
        self.text_bytes = 0  # of bitmaps, in memory for those who have them open
        self._bypassed = False  # nobody has used the page cache of `active` since

    def __getitem__(self, number: int) -> Handle:
        return self._handles[number]

    def add_active(self, inode: int, thread: int, flags: int) -> Handle:
        """`active` is opened by that thread, with these flags of open(2)."""
        own = self._page_cache.is_own(thread)
        other = next(iter(self._of.get(inode, {}).values()), None)
        if own:
            direct = True  # it neither reads nor writes
        elif other is not None:
            direct = other.direct
        else:
            direct = bool(flags & os.O_DIRECT)
        keep_cache = direct or not self._bypassed
        if not own:
            self._bypassed = direct
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        synchronous = bool(flags & os.O_DSYNC)  # O_SYNC includes it
        handle = Handle(
            self._next_number(), inode, None, own, direct, keep_cache, writable, synchronous
        )
        return self._add(handle)

    def add_snapshot(
        self, inode: int, layer: Layer, thread: int, creator: int | None = None
    ) -> Handle:
        """A snapshot is opened; `creator`: by the thread that has just made it."""
        own = self._page_cache.is_own(thread)
        handle = Handle(self._next_number(), inode, layer, own, False, True, creator=creator)
        return self._add(handle)

    def add_bitmap(self, inode: int, content: bytes) -> Handle:
        """A bitmap is opened, whose size nobody knows before it is read."""
        handle = Handle(self._next_number(), inode, None, False, True, False, content=content)
        return self._add(handle)

    def _next_number(self) -> int:
        """One whose slot is free, as long as there is one."""
        self._last += 1
        if len(self._slots) < SLOTS:
            while self._last % SLOTS in self._slots:
                self._last += 1
        return self._last

    def _add(self, handle: Handle) -> Handle:
        self._handles[handle.number] = handle
        self._slots[handle.number % SLOTS] += 1
        self.text_bytes += len(handle.content or b"")
        if not handle.own:
            self._of[handle.inode][handle.number] = handle
        self._count(handle, 1)
        self._dirtying[handle.inode] += _may_dirty(handle)
        requestfilter.handle_opened(handle.number, handle.inode)
        return handle

    def remove(self, number: int) -> Handle:
        """A file has been closed by all who had it."""
        requestfilter.handle_closed(number)
        handle = self._handles.pop(number)
        slot, inode = number % SLOTS, handle.inode
        self.text_bytes -= len(handle.content or b"")
        self._slots[slot] -= 1
        if not self._slots[slot]:
            del self._slots[slot]
        self._dirtying[inode] -= _may_dirty(handle)
        self._count(handle, -1)
        self._of[inode].pop(number, None)
        if not self._of[inode]:
            del self._of[inode], self._dirtying[inode]
        return handle

    def _count(self, handle: Handle, change: int) -> None:
        if handle.own or handle.content is not None:
            return
        if handle.writable:
            self.writers += change
        else:
            self.readers += change

    def may_be_dirty(self, inode: int) -> bool:
        """May the page cache have data of the file that has not been written to us?

        Through a shared mapping or the writeback cache, then; the kernel writes
        it back before the last close of such a file, and of such a mapping.
        """
        return self._dirtying[inode] > 0

    def has_created(self, inode: int, thread: int) -> bool:
        """Has the thread made this snapshot through a handle that is still open, as touch does?"""
        return any(handle.creator == thread for handle in self._of.get(inode, {}).values())


def _may_dirty(handle: Handle) -> bool:
    return handle.writable and not handle.direct
