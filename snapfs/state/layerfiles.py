"""The files of a layer that must survive a power cut: in which order they are synced.

What the disk holds of a mapped file is what was synced, or anything newer: the
kernel writes pages back when it likes, each on its own.  So a bit reaches the
mapping only when it may be found after a power cut:

    done set        its data is durable (copier.py)
    done cleared    never; nobody has access to what it stands for, and the
                    next mount finds that out
    access cleared  the record of losses is durable: a snapshot that lacks
                    clusters must say so
"""

from __future__ import annotations

import os
from collections.abc import Callable

import trio
from attrs import define, field

from ..engine.bitmap import Bitmap, ClearLater, SetThrough
from ..engine.durability import Commits, DoneFile, GroupCommit
from ..engine.layer import LayerParts
from ..storage.image import Image
from ..storage.mapping import Mapping, failure_of_any, unreadable
from ..storage.offload import in_thread
from .statefiles import open_file, sync_data


def _nothing() -> None:
    """What there is to do for most files."""


def _plainly(call: Callable[..., None], *arguments: object) -> None:
    call(*arguments)


@define(eq=False)
class MappedFile:
    """A mapped file that can be synced.

    Owns the descriptor, not the mapping.  `fd` -1: it is opened for each sync, by `serve`
    if there are no descriptors (`Reserve.serve`), as `name` in `directory`; what could not be
    written back before is told to whoever opens it first, as the mapping keeps the inode in memory.
    `write_again` puts there what may be gone from the mapping after a sync that failed.
    """

    fd: int
    mapping: Mapping
    limiter: trio.CapacityLimiter = field(repr=False)
    directory: int = -1
    name: str = ""
    serve: Callable[..., None] = field(default=_plainly, repr=False)
    write_again: Callable[[], None] = field(default=_nothing, repr=False)
    _syncs: int = field(default=0, init=False)  # under way
    closed: bool = field(default=False, init=False)  # nobody needs it any more

    async def sync(self) -> None:
        """Make what is mapped durable.  OSError: it is not, and a later call writes all again.

        After a failure the kernel takes its pages for clean, although the disk never
        got them (fsync(2), NOTES), and may have dropped them since: then the mapping
        has what the disk has.  So they are written again, and made dirty.
        """
        if self.closed:
            return
        self._syncs += 1
        try:
            await in_thread(self._sync, limiter=self.limiter)
            if self.mapping.failed:  # what is there now is in no file
                raise unreadable()
        except FileNotFoundError:
            if not self.closed:  # else it was removed meanwhile
                raise
        except OSError:
            self.write_again()  # task-atomic, as every change of the bits
            self.mapping[:] = self.mapping[:]
            raise
        finally:
            self._syncs -= 1
            self._close_unused()

    def _sync(self) -> None:
        if self.fd >= 0:
            os.fdatasync(self.fd)
        else:
            self.serve(sync_data, self.directory, self.name)

    def close(self) -> None:
        """Close the descriptor, when no sync is under way."""
        self.closed = True
        self._close_unused()

    def _close_unused(self) -> None:
        if self.closed and not self._syncs and self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@define(eq=False)
class LayerFiles:
    """A layer whose files are made durable step by step.

    `parts` are for the engine.  Close it when no sync can be under way any more.
    """

    parts: LayerParts
    _files: tuple[MappedFile, ...]

    @classmethod
    def open(
        cls,
        place: tuple[int, str],
        temp: Image,
        mappings: dict[str, Mapping],
        clusters: int,
        limiter: trio.CapacityLimiter,
        serve: Callable[..., None] = _plainly,
    ) -> LayerFiles:
        """`mappings`: of the files done, access and losses, by name; blocks.

        `place`: the directory that has that of the layer, whose name it is.  `serve`:
        `Reserve.serve`.
        """
        above, layer = place
        files = {
            name: MappedFile(-1, mapping, limiter, above, f"{layer}/{name}", serve)
            for name, mapping in mappings.items()
        }
        files["done"].fd = open_file(above, f"{layer}/done")  # native code syncs it, too
        done = SetThrough(Bitmap(clusters, mappings["done"]))
        access = ClearLater(Bitmap(clusters, mappings["access"]))
        waiting: list[tuple[int, int]] = []  # cleared, but not durable

        async def sync_access() -> None:
            waiting.extend(access.cleared())
            ranges = list(waiting)
            await files["losses"].sync()
            if files["access"].closed:
                return  # its layer was removed meanwhile, and has no bits any more
            access.apply(ranges)
            await files["access"].sync()
            waiting.clear()  # else they are cleared again, which the page may have lost

        files["done"].write_again = done.set_again
        commits = Commits(
            GroupCommit(files["done"].sync),
            GroupCommit(sync_access),
            DoneFile(files["done"].fd, done.file),
        )
        failure = failure_of_any(mappings.values())
        parts = LayerParts(access, done, temp, mappings["losses"], commits, failure)
        return cls(parts, tuple(files.values()))

    def close(self) -> None:
        """Close the descriptors."""
        for file in self._files:
            file.close()
