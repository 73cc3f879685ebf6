"""What must be on the disk before the image is overwritten or temp space is freed.

With durability=power a snapshot survives the loss of everything that was only
in the page cache.  For that

 - copied data is durable before its done bit is set (`Image.copy_to`): the
   kernel may write a mapped page back at any moment;
 - a done bit, or a cleared access bit, is durable before the image is
   overwritten there, and before space there is freed.

Bits that changed and are not durable yet are *promises* on their range; whoever
overwrites or frees waits until none overlaps.  Many wait for one sync.  With
durability=process there are no promises, and nothing here waits.

Copies that native code makes keep the same order there (copypool.h, waiting.c); what
is not durable when it lets go of them becomes a promise here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio
from attrs import define, frozen

from .bitmap import Bitmap
from .reqlist import Request, RequestList
from .sharedcall import SharedCall


class GroupCommit:
    """Makes a file durable for many callers at once.

    `sync` makes durable what was written before it is called.  One sync is
    under way at a time; who comes meanwhile shares the next one.
    """

    def __init__(self, sync: Callable[[], Awaitable[None]]) -> None:
        self.promises: list[Promise] = []  # not durable yet; task-atomic
        self._sync = sync
        self._shared = SharedCall(self._run)

    async def commit(self, nursery: trio.Nursery) -> None:
        """Return when all that was written before the call is durable.

        The sync runs in `nursery`, so a caller may give up waiting.  Raises
        OSError if it failed; then a later call tries again.
        """
        await self._shared.run(nursery)

    async def _run(self) -> None:
        covered, self.promises = self.promises, []
        try:
            await self._sync()
        except BaseException:
            self.promises = covered + self.promises
            raise
        for promise in covered:
            promise.keep()


@define(eq=False)
class Promise(Request):
    """Bits of [first, stop) that changed; `commit` makes them durable."""

    commit: GroupCommit
    _among: RequestList[Promise]
    kept: bool = False

    def keep(self) -> None:
        """The bits are durable, or do not matter any more."""
        if not self.kept:
            self.kept = True
            self._among.end(self)


@frozen
class DoneFile:
    """The done bits of a layer in their mapped file, for native code.

    `fd` is open while the layer is in the stack.
    """

    fd: int
    bits: Bitmap


@frozen
class Commits:
    """What makes the bits of a layer durable."""

    done: GroupCommit
    access: GroupCommit
    done_file: DoneFile


class Promises:
    """All promises of an image.  Syncs run in `nursery`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._promises: RequestList[Promise] = RequestList()

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Clusters [first, stop) of those that are not kept."""
        return [(promise.first, promise.stop) for promise in self._promises]

    def make(self, commit: GroupCommit, first: int, stop: int) -> None:
        """Bits of [first, stop) changed in a file."""
        if first < stop:
            promise = Promise(first, stop, commit, self._promises)
            self._promises.add(promise)
            commit.promises.append(promise)

    def forget(self, *commits: GroupCommit) -> None:
        """These files do not matter any more."""
        for promise in [each for each in self._promises if each.commit in commits]:
            promise.keep()

    async def kept(self, first: int, stop: int) -> None:
        """Return when every bit of [first, stop) that has changed so far is durable.

        No checkpoint if all are.  Raises OSError if one cannot be made so; it
        stays a promise.
        """
        for promise in [each for each in self._promises if each.overlaps(first, stop)]:
            if not promise.kept:
                await promise.commit.commit(self._nursery)
