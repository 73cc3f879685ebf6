"""Copies of old data into the temp image, and what happens when one fails.

A copy runs in a task of its own, so that the writer who wants it can stop
waiting (`cbw_timeout`) while the copy goes on; two writers to one cluster share
one copy.  A copy that lands sets the done bits and lets the layers settle;
whatever nobody wants by then (discarded, deleted or given up meanwhile) is
punched out again before the copy counts as ended.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import trio
from attrs import define, field, frozen
from attrs.validators import ge, in_, optional

from ..storage.image import Image
from . import bitmap
from .copytimes import CopyTimes
from .counters import Counters
from .durability import Promises
from .events import Events
from .layer import Layer, Policy
from .layers import SLICE, Dropped, LayerStack, Run, shifted
from .regions import Traces
from .reqlist import Request, RequestList
from .space import TempSpace

log = logging.getLogger(__name__)

COPY_RUN = 16 << 20  # bytes of one copy at most: what another writer may have to wait for


@frozen
class Settings:
    """Copy-before-write policy of a mount, and its bounds.

    `cbw_timeout`: seconds that one request waits for its copies, 0 for ever.
    `temp_limit`: bytes that all temp images may take.  `temp_reserve`: bytes
    of their file system that they leave free.  `max_size`: bytes that the image
    may grow to, None: see `ActiveImage`.
    """

    on_cbw_error: Policy = field(
        default="break-snapshot", validator=in_(("break-snapshot", "break-guest-write"))
    )
    cbw_timeout: float = field(default=15.0, validator=ge(0))
    temp_limit: int | None = field(default=None, validator=optional(ge(0)))
    temp_reserve: int = field(default=0, validator=ge(0))
    max_size: int | None = field(default=None, validator=optional(ge(0)))


@define(eq=False)
class Copy(Request):
    """Clusters on their way into the temp image of `layer`."""

    layer: Layer
    voided: list[Run] = field(factory=list)  # given up meanwhile: must not land
    error: OSError | None = None  # of the newest cluster that failed
    empty: bool = False  # a hole of any length; if that fails it is tried as others are
    lent: int = 0  # bytes of temp space, if it is native


class Copier:
    """Steps 1 and 2 of a write: make a range safe to overwrite."""

    def __init__(
        self,
        image: Image,
        stack: LayerStack,
        cluster_size: int,
        nursery: trio.Nursery,
        settings: Settings,
        counters: Counters,
        space: TempSpace,
        on_unpinned: Callable[[Layer], None],
        traces: Traces,
    ) -> None:
        self._image = image
        self._stack = stack
        self._cluster_size = cluster_size
        self._nursery = nursery
        self._settings = settings
        self._counters = counters
        self._space = space
        self._on_unpinned = on_unpinned
        self._traces = traces
        self.times = CopyTimes()
        self._copies: RequestList[Copy] = RequestList()
        self.promises = Promises(nursery)
        self.events = Events()
        self._failing: int | None = None  # errno of the newest copy, if it failed

    async def preserve(self, first: int, stop: int) -> None:
        """Return when no cluster of [first, stop) is pending, and that is durable if it must be.

        None can become pending again before a snapshot is created.  A copy
        that fails, or takes longer than the timeout, goes to the policy:
        either access to the clusters concerned is withdrawn, or OSError is
        raised and nothing is lost.  What cannot be made durable raises OSError
        under either policy: the snapshots would be wrong after a power cut.
        """
        stop = min(stop, len(self._stack.pending))
        timeout = self._settings.cbw_timeout
        deadline = trio.current_time() + timeout if timeout else float("inf")
        while (run := next(self._stack.pending.runs(first, stop), None)) is not None:
            start, end = run
            copy = self._copies.find(start, start + 1)
            mine = copy is None
            if copy is None:
                copy = self._start(start, self._copies.next_start(start, end))
            with trio.move_on_at(deadline) as scope:
                await copy.wait()
            if scope.cancelled_caught:
                self._give_up(start, stop, OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))
            elif mine and copy.error is not None:
                self._give_up(copy.first, copy.stop, copy.error)
            # Another's copy that failed left its clusters pending: we try ourselves.
        with trio.move_on_after(timeout or float("inf")):
            await self.promises.kept(first, stop)
            return
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    async def preserve_long(self, first: int, stop: int, step: int) -> None:
        """`preserve` of a range of any length, in parts of `step` clusters with a timeout each.

        Holes of the image are one part each, however long: nothing is read.
        """
        pending = self._stack.pending
        while (run := next(pending.runs(first, min(stop, len(pending))), None)) is not None:
            start, end = run
            part = min(end, start + step)
            hole = await self._hole(start, min(end, start + SLICE)) if part < end else part
            if hole > part:
                self._start_empty(start, hole)
            await self.preserve(start, max(part, hole))
        await self.preserve(first, stop)  # what others have copied is to be durable, too

    async def _hole(self, first: int, stop: int) -> int:
        """Where the hole ends that the pending clusters from `first` on are in; first: in none.

        It may not be one any more.  Then its copy, which looks again, fails.
        """
        layer = self._stack.receiver
        assert layer is not None, "a cluster is pending, so some snapshot is live"
        offset, length = layer.geometry.span(first, stop)
        data, _ = await self._image.data_extents(offset, length, 1)
        return data[0][0] // self._cluster_size if data else stop

    def _start_empty(self, first: int, stop: int) -> None:
        """Begin to copy clusters of a hole, as far as they are pending from `first` on."""
        run = next(self._stack.pending.runs(first, stop), None)
        if run is not None and self._copies.find(run[0], run[0] + 1) is None:
            self._start(run[0], self._copies.next_start(*run), empty=True)

    def _start(self, first: int, stop: int, empty: bool = False) -> Copy:
        """Begin to copy pending clusters from `first` on; the copy may stop earlier."""
        layer = self._stack.receiver
        assert layer is not None, "a cluster is pending, so some snapshot is live"
        if not empty:
            stop = min(stop, first + max(1, COPY_RUN // self._cluster_size))
        assert stop <= layer.geometry.clusters, "what is cut off by a shrink is copied before"
        copy = Copy(first, stop, layer, empty=empty)
        assert self._copies.find(first, stop) is None, "two copies would undo each other"
        self._copies.add(copy)
        layer.pins += 1
        self._nursery.start_soon(self._run, copy)
        return copy

    async def _run(self, copy: Copy) -> None:
        layer = copy.layer
        try:
            started = trio.current_time()
            failed = await self._transfer(copy)
            seconds = trio.current_time() - started
            self._counters.cbw_seconds += seconds
            if not failed:
                self.times.note(seconds)
            await self.trash(self._land(copy, failed))
        except Exception:  # a bug: the writer must not wait for ever, nor the mount die
            log.exception("a copy ended with an unexpected error")
            copy.error = copy.error or OSError(errno.EIO, os.strerror(errno.EIO))
        finally:
            self._copies.end(copy)
            self.unpin(layer)

    async def _transfer(self, copy: Copy) -> list[Run]:
        """Copy the data; returns the clusters that failed and sets the copy's error."""
        try:
            await self._transfer_run(copy.layer, copy.first, copy.stop, copy.empty)
            self._failing = None
            return []
        except OSError as error:
            copy.error = error
            failed = [(copy.first, copy.stop)]
            if copy.empty:
                return failed
        if copy.stop - copy.first > 1:
            failed = []
            await self.trash([(copy.layer, [(copy.first, copy.stop)])])  # it needs the room
            for cluster in range(copy.first, copy.stop):  # keep what can be kept
                try:
                    await self._transfer_run(copy.layer, cluster, cluster + 1)
                except OSError as error:
                    copy.error = error
                    failed.append((cluster, cluster + 1))
        if not failed:
            copy.error = None
        self._note_failure(copy, failed)
        return failed

    def _note_failure(self, copy: Copy, failed: list[Run]) -> None:
        """Count clusters that failed; logged when failing begins, not for each request."""
        if copy.error is None:
            return
        count = sum(stop - first for first, stop in failed)
        self._counters.cbw_errors += count
        level = logging.DEBUG if self._failing == copy.error.errno else logging.WARNING
        self._failing = copy.error.errno
        log.log(
            level,
            "copy-before-write failed: snapshot %s, offset %d, %d clusters: %s",
            copy.layer.name, failed[0][0] * self._cluster_size, count, copy.error.strerror,
        )  # fmt: skip

    async def _transfer_run(self, layer: Layer, first: int, stop: int, empty: bool = False) -> None:
        offset, length = layer.geometry.span(first, stop)
        # All of it counts as landed at first: nobody knows what a failure leaves.
        budget = landed = 0 if empty else await self._space.claim(length)
        try:
            landed = written = await self._image.copy_to(
                layer.temp, offset, length, self._cluster_size, budget,
                layer.commits is not None,
            )  # fmt: skip
        except OSError as error:
            if error.errno == errno.ENOSPC and budget < length:
                raise OSError(errno.ENOSPC, self._space.explain()) from None
            raise
        finally:
            self._space.release(budget, landed)
        self._space.note(written)
        self._counters.cbw_copies += stop - first
        self._counters.cbw_bytes += written

    # Copies that native code makes: those that it lands itself are only counted

    @property
    def ranges(self) -> list[Run]:
        """Clusters on which copies are under way."""
        return [(copy.first, copy.stop) for copy in self._copies]

    def lend(self, length: int) -> int:
        """Temp space for native copies, at most `length` bytes, until `note_native`.

        Does not wait for the storage: what is not lent is the engine's to copy.
        """
        return self._space.lend(length)

    def note_native(self, lent: int, written: int, clusters: int, seconds: float) -> None:
        """Native copies of so many clusters have landed; the loan ends."""
        self._space.release(lent, written)
        self._count(written, clusters, seconds)
        self.times.seconds += seconds  # how many they were is counted there (FastPath.collect)

    def _count(self, written: int, clusters: int, seconds: float) -> None:
        self._space.note(written)
        self._counters.cbw_copies += clusters
        self._counters.cbw_bytes += written
        self._counters.cbw_seconds += seconds
        if clusters:
            self._failing = None

    def promise(self, first: int, stop: int) -> None:
        """Native copies have landed whose done bits are not durable yet."""
        layer = self._stack.receiver
        assert layer is not None and layer.commits is not None
        self.promises.make(layer.commits.done, first, stop)

    def adopt(self, first: int, stop: int) -> Copy:
        """Take over a native copy that is under way or has failed, to be ended by `conclude`.

        Until then it is one of the copies: writers wait for it, and it is not begun again.
        """
        layer = self._stack.receiver
        assert layer is not None, "native code copies to the receiver only"
        copy = Copy(first, stop, layer)
        copy.lent = self._space.hold(layer.geometry.span(first, stop)[1])  # of a loan that ended
        self._copies.add(copy)
        layer.pins += 1
        return copy

    async def conclude(self, copy: Copy, number: int, written: int, seconds: float) -> None:
        """An adopted copy has ended; `number`: errno, 0 if all of it is there, durable if need be.

        One that failed leaves its clusters pending: the writers that wait try themselves.
        """
        failed: list[Run] = []
        if number:
            copy.error = OSError(number, os.strerror(number))
            failed = [(copy.first, copy.stop)]
        clusters = 0 if number else copy.stop - copy.first
        try:
            self._space.release(copy.lent, copy.lent if number else written)
            self._count(written, clusters, seconds)
            if clusters:
                self.times.note(seconds)
            await self.trash(self._land(copy, failed))
        except Exception:  # a bug: the writer must not wait for ever, nor the mount die
            log.exception("a copy ended with an unexpected error")
            copy.error = copy.error or OSError(errno.EIO, os.strerror(errno.EIO))
        finally:
            self._copies.end(copy)
            self.unpin(copy.layer)

    def void(self, layer: Layer) -> None:
        """No copy to that layer that is under way lands: what it has written may be gone."""
        for copy in self._copies:
            if copy.layer is layer:
                copy.voided.append((copy.first, copy.stop))

    def _land(self, copy: Copy, failed: list[Run]) -> list[Dropped]:
        """Set done for what was copied and is still wanted; returns what to punch out."""
        if not copy.layer.live:  # its snapshot was deleted: another layer gets the copy
            return [(copy.layer, [(copy.first, copy.stop)])]
        good = bitmap.Bitmap(copy.stop - copy.first)
        good.set(0, copy.stop - copy.first)
        for first, stop in failed + copy.voided:
            good.clear(max(first, copy.first) - copy.first, min(stop, copy.stop) - copy.first)
        bits = good.slice(0, len(good))
        for first, stop in shifted(bits, copy.first):
            copy.layer.done.set(first, stop)
            if copy.layer.commits is not None:
                self.promises.make(copy.layer.commits.done, first, stop)
        dropped = self._stack.landed(copy.layer, copy.first, copy.stop)
        return [*dropped, (copy.layer, shifted(~bits, copy.first))]

    async def trash(self, dropped: Sequence[Dropped]) -> None:
        """`punch`, where a failure costs space and nothing else: it is logged."""
        try:
            await self.punch(dropped)
        except OSError as error:
            log.warning("cannot free space in a temp image: %s", error.strerror)

    async def punch(self, dropped: Sequence[Dropped]) -> None:
        """Free clusters of temp images, whose done bits are clear.

        That nobody wants them is made durable first.  Tries all; raises
        OSError of the first failure.
        """
        failure: OSError | None = None
        for layer, runs in dropped:
            if layer.removed:  # all of it goes
                continue
            layer.pins += 1
            try:
                for first, stop in self._merged(layer, runs):
                    try:
                        await self.promises.kept(first, stop)
                        await layer.temp.punch(*layer.geometry.whole(first, stop))
                    except OSError as error:
                        failure = failure or error
            finally:
                self.unpin(layer)
        if failure is not None:
            raise failure

    def _merged(self, layer: Layer, runs: Iterable[Run]) -> Iterator[Run]:
        """The runs, in fewer pieces where what lies between two is as free as they are.

        It is if it has no done bit, and no copy there is under way or can
        begin: to freed clusters that are not pending none does.
        """
        pending = self._stack.pending
        last: Run | None = None
        for first, stop in runs:
            if last is None:
                last = first, stop
            elif (
                layer.done.any(last[1], first)
                or pending.any(last[1], min(first, len(pending)))
                or self._copies.find(last[1], first)
            ):
                yield last
                last = first, stop
            else:
                last = last[0], stop
        if last is not None:
            yield last

    def unpin(self, layer: Layer) -> None:
        """End one use of a layer's temp image, which `pins` counts."""
        layer.pins -= 1
        if layer.removed and not layer.pins:
            self._on_unpinned(layer)

    def _give_up(self, first: int, stop: int, error: OSError) -> None:
        """Let the policy decide about pending clusters that cannot be kept.

        Raises `error` if a snapshot that needs one of them breaks the guest's
        write; else withdraws access to them, after which they are not pending.
        """
        needing = self._stack.needing(first, stop)
        default = self._settings.on_cbw_error
        if any((layer.policy or default) == "break-guest-write" for layer, _ in needing):
            raise OSError(error.errno, error.strerror)
        for layer, bits in needing:
            lost = bits.count()
            level = logging.ERROR if layer.state == "ok" else logging.DEBUG
            if layer.state == "ok":
                self.events.record(
                    "incomplete", snapshot=layer.name, errno=error.errno, reason=error.strerror
                )
            self._traces.note(self._traces.lost, first, bits)
            layer.lose(lost, f"copy-before-write failed: {error.strerror}", error.errno)
            for start, end in bitmap.runs(bits, 0, len(bits)):
                layer.withdraw(first + start, first + end)
                if layer.commits is not None:
                    self.promises.make(layer.commits.access, first + start, first + end)
            log.log(
                level,
                "snapshot %s is incomplete: %d clusters from offset %d on could not be kept: %s",
                layer.name, lost, first * self._cluster_size, error.strerror,
            )  # fmt: skip
        for copy in self._copies:
            if copy.overlaps(first, stop):
                copy.voided.append((max(first, copy.first), min(stop, copy.stop)))
        self._stack.settle(first, stop)
