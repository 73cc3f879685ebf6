"""The copying itself: from a snapshot to a target, in the order that loses nothing.

1. read, write; zeros are written as zeros, never skipped
2. flush the target
3. tell the caller how far it is durable (the journal)
4. only then discard behind, if that is asked for
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator

from attrs import define, field

from ..errors import BackupError
from .plan import Kind, Plan, pieces
from .source import Source
from .sums import UNIT_BYTES, Unit
from .targets import Target

CHECKPOINT_BYTES = 128 << 20  # of data, between two flushes
CHECKPOINT_SECONDS = 5.0
ZERO_BYTES = 64 << 10  # data is looked at for zeros in pieces of this size
_ZEROS = bytes(ZERO_BYTES)


@define
class Copied:
    """What a copy did.  Sizes are bytes; `missing`: (start, length) that could not be read."""

    data: int = 0
    zero: int = 0
    units: list[Unit] = field(factory=list)
    missing: list[tuple[int, int]] = field(factory=list)


class Copying:
    """One copy.  `durable` is called with the position up to which the target has it all."""

    def __init__(
        self,
        source: Source,
        target: Target,
        *,
        durable: Callable[[int], None],
        progress: Callable[[int], None],
        discard: bool = False,
        bytes_per_second: int | None = None,
        checksums: Callable[[int, memoryview], Unit] | None = None,
        alignment: int = 1,
    ) -> None:
        """`checksums`: makes the units of what is copied, if they are wanted.

        `alignment`: checkpoints are at multiples of it, and at the end.
        """
        self._source = source
        self._target = target
        self._durable = durable
        self._progress = progress
        self._discard = discard
        self._rate = bytes_per_second
        self._checksums = checksums
        self._alignment = alignment
        self._since_flush = 0
        self._flushed_at = time.monotonic()
        self._allowed_at = time.monotonic()
        self.copied = Copied()

    def run(self, plan: Plan) -> Copied:
        """Copy everything in the plan, with checkpoints on the way and at the end."""
        for position in self._steps(plan):
            late = time.monotonic() >= self._flushed_at + CHECKPOINT_SECONDS
            due = late or self._since_flush >= CHECKPOINT_BYTES
            if due and position % self._alignment == 0:
                self._checkpoint(position)
        self._checkpoint(plan.end)
        return self.copied

    def copy(self, plan: Plan) -> None:
        """Copy everything in the plan, and leave it to the caller to make it durable."""
        for _ in self._steps(plan):
            pass

    def _steps(self, plan: Plan) -> Iterator[int]:
        """Copy a plan piece by piece, telling after each how far it is."""
        for start, stop, kind in plan:
            if kind is Kind.DATA:
                for first, end in pieces(start, stop, UNIT_BYTES):
                    self._copy(first, end)
                    yield end
            elif kind is Kind.ZERO:
                self._target.zero(start, stop - start)
                self._note(Unit(start, stop - start, None))
                yield stop

    def _note(self, unit: Unit) -> None:
        if unit.digest is None:
            self.copied.zero += unit.length
        else:
            self.copied.data += unit.length
        if self._checksums is not None:
            self.copied.units.append(unit)
        self._progress(unit.length)

    def _copy(self, start: int, stop: int) -> None:
        self._wait_for(stop - start)
        try:
            data = self._source.read(start, stop - start)
        except OSError as error:
            if error.errno != errno.EACCES:
                raise
            self._copy_what_is_left(start, stop)
            return
        self._write(start, data)

    def _copy_what_is_left(self, start: int, stop: int) -> None:
        """Some of the clusters were lost since the plan was made: take the others."""
        for first, end in pieces(start, stop, int(self._source.image["cluster_size"])):
            try:
                data = self._source.read(first, end - first)
            except OSError as error:
                if error.errno != errno.EACCES:
                    raise
                self.copied.missing.append((first, end - first))
                self._progress(end - first)
            else:
                self._write(first, data)

    def _write(self, start: int, data: bytearray) -> None:
        with memoryview(data) as view:
            for piece, zero in split_zeros(view):
                offset, end = piece
                if zero:
                    self._target.zero(start + offset, end - offset)
                else:
                    self._target.write(start + offset, view[offset:end])
            make = self._checksums
            unit = Unit(start, len(data), "") if make is None else make(start, view)
        self._note(unit)
        self._since_flush += len(data)

    def _wait_for(self, length: int) -> None:
        """Until that many bytes may be read: before they are, so that no time has more of them."""
        if self._rate:
            now = time.monotonic()
            self._allowed_at = max(now, self._allowed_at + length / self._rate)
            time.sleep(self._allowed_at - now)

    def _checkpoint(self, position: int) -> None:
        self._target.flush()
        self._durable(position)
        if self._discard:
            self._source.give_up_to(position)
        self._since_flush = 0
        self._flushed_at = time.monotonic()


def split_zeros(view: memoryview) -> list[tuple[tuple[int, int], bool]]:
    """((start, end), is it all zeros), neighbours merged."""
    found: list[tuple[tuple[int, int], bool]] = []
    for start, end in pieces(0, len(view), ZERO_BYTES):
        # Views are compared byte by byte, at a hundredth of the speed of bytes.
        zero = (
            not (view[start] or view[end - 1]) and bytes(view[start:end]) == _ZEROS[: end - start]
        )
        if found and found[-1][1] == zero:
            found[-1] = ((found[-1][0][0], end), zero)
        else:
            found.append(((start, end), zero))
    return found


def describe_ranges(ranges: list[tuple[int, int]], more: int = 0) -> str:
    """Some ranges in a message, the first ones in full; `more` are not among them."""
    shown = ", ".join(f"{start}+{length}" for start, length in ranges[:10])
    more += len(ranges[10:])
    return f"{shown} and {more} more" if more else shown


def check_room(free: int, needed: int, where: str) -> None:
    """Raises BackupError if there is not enough room, before anything is written."""
    if needed > free:
        raise BackupError(
            f"{where} has {free} bytes free and the copy takes up to {needed}; "
            "make room, or use --force if you know better"
        )
