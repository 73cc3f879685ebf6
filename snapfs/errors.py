"""What can go wrong, in the words of snapfs.

Each class carries the exit status of the command line (`exit_code`, the table
in snapfs(1)); none carries an errno: `fuse/errnos.py` has the one table that maps
these classes to errnos.  Failing system calls stay `OSError`.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """Exit statuses of every snapfs command; never reused for something else."""

    OK = 0
    ERROR = 1
    USAGE = 2
    PARTIAL = 3
    SNAPSHOT_UNUSABLE = 4
    NOT_FOUND = 5
    BITMAP_UNUSABLE = 6
    NOT_STORED = 7
    INTERRUPTED = 130


class HelperExit(IntEnum):
    """What mount(8) and umount(8) expect of mount.snapfs and umount.fuse.snapfs."""

    OK = 0
    USAGE = 1  # incorrect invocation or permissions
    SYSTEM = 2
    FAILURE = 32


SYSTEM_ERROR = "system-error"  # the code of a failing system call


def code_of(kind: str) -> str:
    """The word by which JSON tells of an error: "snapshot-not-found" of SnapshotNotFound."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind).lower()


class SnapfsError(Exception):
    """Base of all domain errors; `str()` is one line for the user."""

    exit_code: ClassVar[ExitCode] = ExitCode.ERROR


class UsageError(SnapfsError):
    """The caller asked for something that has no meaning."""

    exit_code = ExitCode.USAGE


class InvalidName(UsageError):
    """A snapshot or bitmap name that is not a plain file name."""


class NameTooLong(InvalidName):
    """A name of more bytes than a file name may have."""


class InvalidRange(UsageError):
    """An offset or length outside what the file can have."""


class ImageTooLarge(SnapfsError):
    """The image would be larger than the mount allows (max-size=)."""


class NotFound(SnapfsError):
    """Something named does not exist."""

    exit_code = ExitCode.NOT_FOUND


class SnapshotNotFound(NotFound):
    """No snapshot has that name."""


class BitmapNotFound(NotFound):
    """No dirty bitmap has that name."""


class NotMounted(NotFound):
    """No snapfs mount, or no live daemon, at that place."""


class SnapshotExists(SnapfsError):
    """A snapshot of that name is there already."""


class BitmapExists(SnapfsError):
    """A dirty bitmap of that name is there already."""


class AccessDenied(SnapfsError):
    """The range is outside the snapshot's access bitmap, or was discarded."""


class SnapshotLost(SnapfsError):
    """The snapshot cannot be read any more: its data is gone or not trusted."""

    exit_code = ExitCode.SNAPSHOT_UNUSABLE


class SnapshotIncomplete(SnapfsError):
    """Some clusters of the snapshot could not be kept."""

    exit_code = ExitCode.SNAPSHOT_UNUSABLE


class BitmapUnusable(SnapfsError):
    """A bitmap is missing, inconsistent or of the wrong size: a full copy is needed."""

    exit_code = ExitCode.BITMAP_UNUSABLE


class ReadOnly(SnapfsError):
    """Snapshots are never written, and nothing is in a mount with `-o ro`."""


class NotSupported(SnapfsError):
    """A request that snapfs has no answer to, such as a collapse-range."""


class NotPermitted(SnapfsError):
    """The caller may not do that: not the owner, or a fixed part of the tree."""


class Pinned(NotPermitted):
    """A pinned snapshot is neither deleted nor discarded."""


class NotStored(SnapfsError):
    """Something that was written may be gone: storage could not take it."""

    exit_code = ExitCode.NOT_STORED


class InUse(SnapfsError):
    """The image or the state directory belongs to another process."""


class LimitReached(SnapfsError):
    """Too few file descriptors are left for that; the message has the numbers and the remedy."""


class StillInUse(SnapfsError):
    """A mount is gone, but others have its file system mounted as well: its daemon goes on."""

    exit_code = ExitCode.PARTIAL


class StateError(SnapfsError):
    """The state directory cannot be used as it is; the message says why."""


class MountError(SnapfsError):
    """The mount could not be made; the message names the remedy."""


class BackupError(SnapfsError):
    """A copy, backup or restore cannot be made; the message names the remedy."""


class NoRoom(BackupError):
    """There is not enough space for what is about to be written."""


class PartialCopy(SnapfsError):
    """A file is an unfinished copy: it must not be taken for a whole one."""

    exit_code = ExitCode.SNAPSHOT_UNUSABLE


class StreamBroken(SnapfsError):
    """A stream ends before its end, or is not what was sent."""

    exit_code = ExitCode.SNAPSHOT_UNUSABLE


class WrongBase(SnapfsError):
    """An image is not at the moment that a stream of changes begins at: a full copy is needed."""

    exit_code = ExitCode.BITMAP_UNUSABLE


class PointDamaged(SnapfsError):
    """A point of a backup is not what its checksums say."""

    exit_code = ExitCode.SNAPSHOT_UNUSABLE


class KeyRefused(SnapfsError):
    """An encrypted backup cannot be read without its key, or not with the one that was given."""
