"""`snapfs receive`: a stream applied to a raw image, or nothing at all.

    before the first write    IMAGE.partial says what is being received; durably.  A block device
                              has the mark on it instead
    on the way                IMAGE is synced, then IMAGE.partial says how far it is
    at the end                IMAGE is synced, IMAGE.received says what it holds, durably, and
                              then IMAGE.partial goes

Whenever it is killed, IMAGE is what it was, or marked as unfinished, or whole.  A record is
written when its digest was right, and the end only counts with the totals of all of them.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

from attrs import evolve, frozen

from ..client.reasons import why
from ..errors import BackupError, PartialCopy, StreamBroken, UsageError, WrongBase
from . import copies, devices, received, records
from .copies import Journal
from .copying import CHECKPOINT_BYTES, CHECKPOINT_SECONDS, check_room
from .devices import DeviceTarget
from .moments import Moment
from .progress import Progress
from .sending import NOTHING, state_of
from .source import refuse_served
from .stream import Header, Reader, Record, widen
from .targets import RawTarget

_WHOLE = "whole"  # in place of a base


@frozen
class ReceiveOptions:
    """What the command line says."""

    force: bool = False
    progress_fd: int | None = None
    json: bool = False
    quiet: bool = False


class _HoldsIt(Exception):
    """The image is at the moment of the stream already."""


def receive(image: str, file: BinaryIO, options: ReceiveOptions) -> dict[str, Any]:
    """Apply a stream to an image; returns the summary.

    Raises StreamBroken, WrongBase, UsageError, PartialCopy, BackupError, InUse.
    """
    if file.isatty():
        raise UsageError(
            "a stream does not come from a terminal: snapfs send SNAPSHOT | snapfs receive IMAGE"
        )
    path = os.path.realpath(image)
    refuse_served(path, "receive")
    with suppress(OSError):  # of a file in memory
        widen(file.fileno())
    reader = Reader(file)
    stream = iter(reader)
    first = next(stream, None)
    run = _Run(path, reader.header, options)
    try:
        run.begin()
    except _HoldsIt:
        for _ in stream:  # whoever sends it shall not fail
            pass
        return run.summary(already=True)
    with run:
        run.apply(first, stream)
    if not reader.is_at_end():
        raise BackupError(f"{path} is complete, and something follows the stream; it was not read")
    return run.summary()


def state(image: str) -> dict[str, Any]:
    """What an image holds, and what `send --resume-from` takes of it."""
    path = os.path.realpath(image)
    journal, held = Journal.read(path), received.read(path)
    found: dict[str, Any] = {"image": path, "state": NOTHING, "created": None, "position": None}
    if not os.path.exists(path):
        return found
    if journal is not None and not _is_leftover(path, journal, held):
        moment = _receiving(journal)
        if moment is None:
            raise PartialCopy(f"{path} is an unfinished copy or restore of something else")
        at = journal.position
        if not _is_there(path, journal, held):
            if not journal.source.endswith(f" {_WHOLE}"):
                raise WrongBase(_not_the_file(path))
            at = 0
        return found | {
            "state": state_of("partial", moment, at), "created": moment.created, "position": at
        }  # fmt: skip
    if held is None:
        return found
    if not held.is_unchanged(path):
        raise WrongBase(_changed(path, held))
    return found | {"state": state_of("complete", held.moment), "created": held.moment.created}


def _receiving(journal: Journal) -> Moment | None:
    """The moment that is being received, None if it is something else."""
    words = journal.source.split(" ")
    return Moment(words[1], journal.size) if words[0] == "receive" else None


def _is_leftover(path: str, journal: Journal, held: received.Received | None) -> bool:
    """Is the image whole, and only the mark not yet removed?"""
    moment = _receiving(journal)
    return (
        moment is not None
        and held is not None
        and not devices.is_device(path)
        and held.moment.is_same(moment)
        and held.is_unchanged(path)
    )


def _is_there(path: str, journal: Journal, held: received.Received | None) -> bool:
    """Is an unfinished image what it was left as, whatever moment we were killed at?"""
    if devices.is_device(path):
        return True
    size = os.stat(path).st_size
    begun = journal.position == 0 and held is not None and size == held.moment.size
    if size != journal.size and not begun:
        return False
    return journal.proof is None or journal.proof == received.proof_of(path)


def _not_the_file(path: str) -> str:
    return (
        f"{path} is not what had got a part of this snapshot, or was written to since; send "
        "everything, without --since, and receive it with --force"
    )


def _changed(path: str, held: received.Received) -> str:
    return (
        f"{path} was at {held.words}, and was written to since, or that cannot be known; send "
        "everything, without --since, and receive it with --force"
    )


class _Run:
    """One stream and its image.  A context manager, once it has begun."""

    def __init__(self, path: str, header: Header, options: ReceiveOptions) -> None:
        self._path = path
        self._header = header
        self._options = options
        base = _WHOLE if header.base is None else header.base.created
        self._journal = Journal(
            copies.VERSION, f"receive {header.moment.created} {base}", header.size, "raw"
        )
        self._target: RawTarget
        self._data = self._zero = 0

    def begin(self) -> None:
        """Lock the image, refuse what it cannot take, and mark it; raises _HoldsIt."""
        if not devices.is_device(self._path):
            self._target = RawTarget(self._path, self._header.size, self._check)
            records.sync_directory(os.path.dirname(self._path))
            return
        if not self._options.force and self._header.base is None and self._is_foreign_device():
            raise UsageError(
                f"{self._path} is a block device; use --force to overwrite what is on it"
            )
        available = devices.size_of(self._path)
        if available < self._header.size:
            raise BackupError(
                f"{self._path} has {available} bytes, the snapshot has {self._header.size}"
            )
        mark = records.unstructure(self._journal)
        whole = self._header.base is None and not self._header.start
        self._target = DeviceTarget(
            self._path, self._header.size, mark, whole_head=whole, ours=self._check
        )
        self._journal.store(self._path, self._target)  # with the position that was found

    def _is_foreign_device(self) -> bool:
        journal = Journal.read(self._path)
        return journal is None or journal.source != self._journal.source

    def _check(self) -> None:
        """The image is locked, and as it was: raises what is wrong, or marks it."""
        journal, held = Journal.read(self._path), received.read(self._path)
        if journal is not None and _is_leftover(self._path, journal, held):
            self._remove_mark()
            journal = None
        if journal is not None:
            self._refuse_other(journal, held)
        elif self._header.base is None:
            self._refuse_to_overwrite(held)
        else:
            self._refuse_wrong_base(self._header.base, held)
        if not devices.is_device(self._path):
            self._journal.write(self._path)

    def _refuse_other(self, journal: Journal, held: received.Received | None) -> None:
        """The image is unfinished."""
        header = self._header
        if journal.source == self._journal.source and journal.size == header.size:
            there = _is_there(self._path, journal, held)
            position = journal.position if there else 0
            if header.start > position:
                raise UsageError(
                    f"the stream goes on at {header.start}, and {self._path} has everything up "
                    f"to {position}; give send what snapfs receive --state says"
                )
            if not there and header.base is not None:
                raise WrongBase(_not_the_file(self._path))
            self._journal = evolve(self._journal, position=position)
            return
        everything = header.base is None and not header.start
        if everything and (self._options.force or journal.source.endswith(f" {_WHOLE}")):
            return
        moment = _receiving(journal)
        what = "something else" if moment is None else f"the snapshot of {moment.created}"
        raise WrongBase(
            f"{self._path} is unfinished: it has got a part of {what}; send that again, or send "
            "everything, without --since, and receive it with --force"
        )

    def _refuse_to_overwrite(self, held: received.Received | None) -> None:
        self._stop_if_there(held)
        self._refuse_the_rest()
        if devices.is_device(self._path):
            return
        status = os.stat(self._path)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{self._path} is neither a regular file nor a block device")
        if self._options.force:
            return
        if status.st_size:
            what = "exists" if held is None else f"is at {held.words}"
            raise UsageError(
                f"{self._path} {what}, and the stream has everything; use --force to overwrite "
                "it, or send with --since what changed"
            )
        room = os.statvfs(os.path.dirname(self._path))
        check_room(room.f_bavail * room.f_frsize, self._header.data_bytes, self._path)

    def _stop_if_there(self, held: received.Received | None) -> None:
        header = self._header
        if held and held.moment.is_same(header.moment) and held.is_unchanged(self._path):
            raise _HoldsIt

    def _refuse_wrong_base(self, base: Moment, held: received.Received | None) -> None:
        if held is None:
            raise WrongBase(
                f"nobody knows what {self._path} holds, and the stream has only what changed "
                f"since {base.created}; send everything once, without --since"
            )
        if not held.is_unchanged(self._path):
            raise WrongBase(_changed(self._path, held))
        self._stop_if_there(held)
        if not held.moment.is_same(base):
            raise WrongBase(
                f"{self._path} is at {held.words}, and the stream has what changed since "
                f"{base.created}; send what changed since the former, or everything"
            )
        self._refuse_the_rest()

    def _refuse_the_rest(self) -> None:
        if self._header.start:
            raise UsageError(
                f"the stream goes on at {self._header.start}, and nothing of it has come to "
                f"{self._path}; send it without --resume-from"
            )

    def apply(self, first: Record | None, stream: Iterator[Record]) -> None:
        """Write all records and make it durable; raises what `receive` does."""
        header, target = self._header, self._target
        position, since, flushed = header.start, 0, time.monotonic()
        try:
            with Progress("receive", header.data_bytes, self._options) as progress:
                record = first
                while record is not None:
                    self._write(record)
                    progress.advance(len(record.data))
                    position, since = record.stop, since + len(record.data)
                    late = time.monotonic() >= flushed + CHECKPOINT_SECONDS
                    if late or since >= CHECKPOINT_BYTES:
                        self._checkpoint(position)
                        since, flushed = 0, time.monotonic()
                    record = next(stream, None)
        except (StreamBroken, KeyboardInterrupt) as error:
            with suppress(OSError):
                self._checkpoint(position, last=True)
            if isinstance(error, KeyboardInterrupt):
                raise
            raise StreamBroken(f"{error}.  {self._unfinished()}") from None
        except OSError as error:
            raise BackupError(f"{why(error)}.  {self._unfinished()}") from None
        source = {"snapshot": header.snapshot, "image": header.image, "host": header.host}
        received.finish(target, self._path, header.moment, **source)
        self._remove_mark()

    def _write(self, record: Record) -> None:
        if record.kind == b"ZERO":
            self._target.zero(record.offset, record.length)
            self._zero += record.length
        else:
            self._target.write(record.offset, record.data)
            self._data += record.length

    def _checkpoint(self, position: int, *, last: bool = False) -> None:
        self._target.flush()
        proof = None
        if isinstance(self._target, DeviceTarget):
            self._target.save_head()
        elif last:
            proof = received.proof_of(self._path)
        position = max(self._journal.position, position)
        self._journal = evolve(self._journal, position=position, proof=proof)
        self._journal.store(self._path, self._target)

    def _unfinished(self) -> str:
        return (
            f"{self._path} is unfinished, and has everything up to {self._journal.position}; send "
            "the same again, or only the rest: --resume-from takes what snapfs receive --state "
            f"{self._path} says"
        )

    def _remove_mark(self) -> None:
        if not devices.is_device(self._path):
            records.remove(Journal.path_of(self._path))
            records.sync_directory(os.path.dirname(self._path))

    def summary(self, *, already: bool = False) -> dict[str, Any]:
        """What was done."""
        header = self._header
        return {
            "image": self._path,
            "snapshot": header.snapshot,
            "created": header.moment.created,
            "size": header.size,
            "since": None if header.base is None else header.base.created,
            "received_bytes": self._data,
            "zero_bytes": self._zero,
            "resumed_at": header.start,
            "already_there": already,
        }

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._target.abandon()
