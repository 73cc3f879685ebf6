"""`snapfs copy`: one snapshot to one place, resumable, marked until it is whole.

Beside DEST lies DEST.partial from before the first byte is written until
everything is durable; a block device has the mark on it instead (devices.py).
It says which copy this is and how far it is durable, so an interrupted one goes
on there; what was discarded behind is before that.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import Any

from attrs import asdict, evolve, field, frozen
from attrs.validators import ge, in_

from ..errors import BackupError, PartialCopy, SnapfsError, SnapshotIncomplete, UsageError
from . import devices, qemu, records
from .copying import Copied, Copying, check_room, describe_ranges
from .devices import DeviceTarget
from .extents import Extents
from .plan import Kind, Plan
from .progress import Progress
from .source import Source, refuse_served
from .targets import Qcow2Target, RawTarget, Target, lock, qcow2_bytes

VERSION = 1
MISSING_SHOWN = 50  # ranges in a journal: the mark of a device is small


@frozen
class Journal:
    """What DEST.partial says.  `position`: bytes before it are durable at DEST."""

    version: int
    source: str  # Source.key; or what else is being written to DEST
    size: int = field(validator=ge(0))
    format: str = field(validator=in_(("raw", "qcow2")))
    backing: str | None = None
    position: int = field(default=0, validator=ge(0))
    incomplete: bool = False
    missing: tuple[tuple[int, int], ...] = ()  # before `position`: offset and length of the first
    missing_more: int = 0  # and how many more
    proof: str | None = None  # what DEST looked like when it was left so, see received.py

    @staticmethod
    def path_of(dest: str) -> str:
        """The file beside DEST."""
        return f"{dest}.partial"

    @classmethod
    def read(cls, dest: str) -> Journal | None:
        """The journal of DEST, None if DEST is whole."""
        if devices.is_device(dest):
            return cls._of_device(dest)
        path = cls.path_of(dest)
        try:
            with open(path, "rb") as file:
                return records.structure(file.read(), cls, path, VERSION)
        except FileNotFoundError:
            return None

    @classmethod
    def _of_device(cls, dest: str) -> Journal | None:
        found = devices.read_mark(dest)
        if found is None:
            return None
        try:
            return records.structure(found[1], cls, dest, VERSION)
        except BackupError:
            return cls(VERSION, "", 0, "raw")  # torn by a power cut: of nobody knows what

    def with_missing(self, ranges: list[tuple[int, int]]) -> Journal:
        """With more ranges that DEST does not have, named as long as there is room."""
        both = [*self.missing, *ranges]
        more = self.missing_more + len(both[MISSING_SHOWN:])
        return evolve(self, missing=tuple(both[:MISSING_SHOWN]), missing_more=more)

    def anew(self) -> Journal:
        """The same copy, at its beginning."""
        return evolve(self, position=0, incomplete=False, missing=(), missing_more=0)

    def write(self, dest: str) -> None:
        """Store it beside a file, durably."""
        records.replace_durably(self.path_of(dest), records.unstructure(self))

    def store(self, dest: str, target: Target) -> None:
        """Store it where it belongs, durably."""
        if isinstance(target, DeviceTarget):
            target.mark(records.unstructure(self))
        else:
            self.write(dest)


records.register(Journal)


def refuse_partial(path: str) -> None:
    """Raises PartialCopy if a file is an unfinished copy."""
    if devices.is_device(path):
        if devices.read_mark(path) is not None:
            raise PartialCopy(f"{path} is an unfinished copy; finish it with the same command")
    elif os.path.exists(Journal.path_of(path)):
        raise PartialCopy(
            f"{path} is an unfinished copy ({Journal.path_of(path)} is there); "
            "finish it with the same command, or delete both"
        )


@frozen
class CopyOptions:
    """What the command line says."""

    format: str = "raw"
    backing: str | None = None
    discard: bool = False
    force: bool = False
    allow_missing: bool = False
    bytes_per_second: int | None = None
    progress_fd: int | None = None
    json: bool = False
    quiet: bool = False


def copy(snapshot: str, dest: str, options: CopyOptions) -> dict[str, Any]:
    """Copy a snapshot; returns the summary.

    Raises SnapshotIncomplete when all that there is was copied and some is
    missing: DEST stays marked as partial then.
    """
    if options.backing is not None and options.format != "qcow2":
        raise UsageError("--backing is for --format qcow2")
    with Source(snapshot, discard=options.discard) as source:
        _refuse_own(source, dest)
        wanted = Journal(
            VERSION, source.key, source.size, options.format,
            None if options.backing is None else os.path.abspath(options.backing),
        )  # fmt: skip
        head = 0
        if devices.is_device(dest):
            _check_device(dest, source.size, options)
            head = min(devices.HEAD_BYTES, source.size)
        journal = _begin_or_resume(wanted, Journal.read(dest), dest, source)
        # The head of a device is needed until the end: it comes last, and is given up last.
        plans = [source.plan(max(journal.position, head)), source.plan(0, head)]
        if journal.position == 0:
            _check_destination(source, plans[0], dest, options)
        target = _open(journal, dest, options, whole_head=not plans[1].total(Kind.MISSING))
        try:
            copied = _run(source, target, plans, journal, dest, options)
            _end(source, target, plans, copied, journal, dest, options)
        except BaseException:
            target.abandon()
            raise
        if options.discard:
            source.give_up_all()
        summary = _summary(source, dest, journal.position, copied)
    records.remove(Journal.path_of(dest))
    records.sync_directory(os.path.dirname(os.path.abspath(dest)))
    return summary


def _refuse_own(source: Source, dest: str) -> None:
    """The image that is being served is no destination, nor is anything in a mount."""
    refuse_served(dest, "copy")
    if os.path.exists(dest) and os.path.samefile(dest, source.image["path"]):
        raise UsageError(
            f"{dest} is the image that is mounted on {source.mountpoint}; copy to another file"
        )


def _begin_or_resume(wanted: Journal, found: Journal | None, dest: str, source: Source) -> Journal:
    if found is None:
        return wanted
    if found.anew() == wanted and os.path.exists(dest):
        return evolve(found, incomplete=False)
    counts = source.described["clusters"]
    if counts["accessible"] == counts["total"] and wanted.backing is None:
        return wanted  # the whole image: whatever was there does not matter
    instead = "" if devices.is_device(dest) else f"delete {dest} and {Journal.path_of(dest)} and "
    raise PartialCopy(
        f"{dest} is an unfinished copy of something else, and {source.name} does not hold "
        f"everything; finish that copy, or {instead}make a full copy"
    )


def _check_destination(source: Source, plan: Plan, dest: str, options: CopyOptions) -> None:
    try:
        status: os.stat_result | None = os.stat(dest)
    except FileNotFoundError:
        status = None
    partial = os.path.exists(Journal.path_of(dest))
    occupied = 0
    if status is not None and stat.S_ISBLK(status.st_mode):
        return
    if status is not None:
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{dest} is neither a regular file nor a block device")
        if options.format == "qcow2" and not (options.force or partial):
            raise UsageError(f"{dest} exists; use --force to replace it")
        if options.format == "raw" and status.st_size and qemu.file_format(dest) != "raw":
            raise UsageError(
                f"{dest} is a qcow2 image; give --format qcow2 and a new name, or delete it"
            )
        occupied = status.st_blocks * 512
    missing = plan.total(Kind.MISSING)
    new = status is None or not status.st_size
    stands_alone = options.backing is None and (new or options.format == "qcow2")
    whole = source.described["state"] == "ok"  # else all that is left of it is copied
    if missing and stands_alone and whole and not options.allow_missing:
        raise UsageError(
            f"{missing} bytes of {source.name} may not be read, so {dest} would not be the "
            "whole image; apply it to an existing copy, give --backing PREVIOUS with "
            "--format qcow2, or use --allow-missing"
        )
    if options.format == "raw" and not (new or partial or options.force):
        assert status is not None
        _refuse_no_image(status.st_size, source, plan, dest, options)
    if options.backing is not None:
        refuse_partial(options.backing)
    if not options.force:
        room = os.statvfs(os.path.dirname(os.path.abspath(dest)))
        needed = plan.total(Kind.DATA)
        if options.format == "qcow2":
            needed = qcow2_bytes(plan, _below(source.size, options.backing))
        check_room(room.f_bavail * room.f_frsize + occupied, needed, dest)


def _refuse_no_image(
    size: int, source: Source, plan: Plan, dest: str, options: CopyOptions
) -> None:
    """Raises UsageError if a file can hardly be a copy of the image that is to be renewed."""
    left_out = plan.ranges(Kind.MISSING)
    if left_out and source.described["state"] == "ok" and not options.allow_missing:
        reach = sum(left_out[-1])
        if size < reach:
            raise UsageError(
                f"{dest} has {size} bytes, and what {source.name} leaves out reaches to {reach}: "
                "it is no copy of the image; use --force to write to it nevertheless"
            )
    elif size != source.size:
        raise UsageError(
            f"{dest} exists, and is no image of {source.size} bytes; use --force to overwrite it"
        )


def _check_device(dest: str, size: int, options: CopyOptions) -> None:
    if options.format == "qcow2":
        raise UsageError(f"{dest} is a block device; only raw copies go there")
    if not options.force:
        raise UsageError(f"{dest} is a block device; use --force to overwrite what is on it")
    available = devices.size_of(dest)
    if available < size:
        raise BackupError(
            f"{dest} has {available} bytes, the snapshot has {size}; choose a larger device"
        )


def _open(journal: Journal, dest: str, options: CopyOptions, *, whole_head: bool) -> Target:
    if devices.is_device(dest):
        mark = records.unstructure(journal)
        return DeviceTarget(dest, journal.size, mark, whole_head=whole_head)
    if journal.format == "raw":
        return RawTarget(dest, journal.size, lambda: journal.write(dest))
    if journal.position == 0:
        _make_qcow2(journal, dest, options)
    else:
        qemu.free_leaks(dest)
    below = _below(journal.size, options.backing)
    return Qcow2Target(dest, journal.size, resumable=True, below=below)


def _below(size: int, backing: str | None) -> Extents:
    """What may be below a qcow2 DEST: nothing, or we do not know what."""
    return Extents() if backing is None else Extents([(0, size)])


def _make_qcow2(journal: Journal, dest: str, options: CopyOptions) -> None:
    """An empty image, marked, in place of what nobody has open; raises InUse if somebody has."""
    fd = -1
    try:
        with suppress(FileNotFoundError):
            fd = os.open(dest, os.O_RDWR | os.O_CLOEXEC)
            lock(fd, dest)
        journal.write(dest)
        records.remove(dest)
        try:
            qemu.create(dest, journal.size, options.backing)
        except BaseException:
            records.remove(dest)
            records.remove(Journal.path_of(dest))
            raise
    finally:
        if fd >= 0:
            os.close(fd)


def _run(
    source: Source,
    target: Target,
    plans: list[Plan],
    journal: Journal,
    dest: str,
    options: CopyOptions,
) -> Copied:
    """Copy the plans, the head of a device last."""
    most, head = plans
    if isinstance(target, DeviceTarget):
        source.spare(head.end)
    if options.discard and journal.position:
        source.give_up_to(journal.position)  # copied before the interruption
    total = sum(plan.total(Kind.DATA) + plan.total(Kind.ZERO) for plan in plans)
    with Progress(source.name, total, options, "copy") as progress:

        def durable(position: int) -> None:
            gone = copying.copied.missing
            if source.described["state"] != "ok":
                gone = [*gone, *(each for each in most.ranges(Kind.MISSING) if each[0] < position)]
            now = evolve(journal.with_missing(gone), position=max(journal.position, position))
            now.store(dest, target)

        copying = Copying(
            source,
            target,
            durable=durable,
            progress=progress.advance,
            discard=options.discard,
            bytes_per_second=options.bytes_per_second,
        )
        copying.run(most)
        if head:
            copying.copy(head)
    return copying.copied


def _end(
    source: Source,
    target: Target,
    plans: list[Plan],
    copied: Copied,
    journal: Journal,
    dest: str,
    options: CopyOptions,
) -> None:
    """Finish the target; raises what is wrong with the copy when all that there is has arrived."""
    # A file can be unmarked by hand, a device only by us.
    stays = not (options.allow_missing and isinstance(target, DeviceTarget))
    mark = f"{dest} stays marked as partial" if stays else f"{dest} has no mark any more"
    problem: SnapfsError | None = None
    state = source.look()
    if state["state"] != "ok":
        ranges = [each for plan in plans for each in plan.ranges(Kind.MISSING)]
        journal = journal.with_missing([*ranges, *copied.missing])
        problem = SnapshotIncomplete(
            f"snapshot {source.name} is {state['state']} ({state['reason']}): all that there is "
            f"was copied, and {mark}; missing, as offset+length: "
            f"{describe_ranges(sorted(journal.missing), journal.missing_more)}"
        )
        evolve(journal, position=source.size, incomplete=True).store(dest, target)
    elif copied.missing:
        problem = PartialCopy(
            f"somebody discarded {describe_ranges(copied.missing)} (offset+length) of "
            f"{source.name} while it was copied; {mark}"
        )
    if problem is None or not (stays and isinstance(target, DeviceTarget)):
        target.finish()
        records.sync_directory(os.path.dirname(os.path.abspath(dest)))
    if problem is not None:
        raise problem


def _summary(source: Source, dest: str, resumed_at: int, copied: Copied) -> dict[str, Any]:
    counts = asdict(copied)
    return {
        "snapshot": source.name,
        "dest": dest,
        "size": source.size,
        "copied_bytes": counts["data"],
        "zero_bytes": counts["zero"],
        "disk_bytes": None if devices.is_device(dest) else os.stat(dest).st_blocks * 512,
        "resumed_at": resumed_at,
    }
