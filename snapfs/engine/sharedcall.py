"""One call for all who want its outcome at the same time.

Some calls tell of a moment, and serve everybody who asked before it: a sync
makes durable what was written by then, an answer is right for what was so when
the question was put.  So one call is under way at a time, and whoever comes
meanwhile shares the next one.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Awaitable, Callable

import trio
from attrs import define, field

log = logging.getLogger(__name__)


@define(eq=False)
class _Call:
    """One call, for all who came before it began."""

    error: OSError | None = None
    ended: trio.Event = field(factory=trio.Event)


class SharedCall:
    """Makes a call for many callers at once, in a task of `nursery`."""

    def __init__(self, call: Callable[[], Awaitable[None]]) -> None:
        self._call = call
        self._next: _Call | None = None  # task-atomic
        self._leading = False  # task-atomic

    async def run(self, nursery: trio.Nursery) -> None:
        """Return when a call has ended that began after this one did.

        A caller may give up waiting: the call goes on.  Raises OSError if it
        failed; then a later caller makes it again.
        """
        if self._next is None:
            self._next = _Call()
        mine = self._next
        if not self._leading:
            self._leading = True
            nursery.start_soon(self._lead)
        await mine.ended.wait()
        if mine.error is not None:
            raise OSError(mine.error.errno, mine.error.strerror)

    async def _lead(self) -> None:
        try:
            while (mine := self._next) is not None:
                self._next = None
                with trio.CancelScope(shield=True):
                    await self._make(mine)
        finally:
            self._leading = False

    async def _make(self, mine: _Call) -> None:
        try:
            await self._call()
        except Exception as error:
            if not isinstance(error, OSError):
                log.exception("a call for several ended with an unexpected error")
                error = OSError(errno.EIO, os.strerror(errno.EIO))
            mine.error = error
        finally:
            mine.ended.set()
