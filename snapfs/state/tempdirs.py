"""Temp images outside of the state directory: DIR/snapfs-RANDOM/ID-LAYER.temp.

DIR is what the option says, and may be one that everybody can write to, such as /tmp, if it is
sticky.  So there they are in a directory of our own, which nobody else may enter, under a name
that nobody could know before, and the manifest has it.  It goes when it is empty at the end.

ID belongs to one state directory at one place.  A state directory that is
found elsewhere was moved, or copied; the first to be mounted takes the temp
images over by renaming them, so that two copies can never share one, and spoil
each other's snapshots.  The new id follows from the old one and the place, so
a mount that dies between two renames is continued by the next.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterable

from attrs import define, field

from ..errors import StateError
from ..storage.naming import naming
from . import statefiles

PREFIX = "snapfs-"


def new_id() -> str:
    """The id of a new state directory."""
    return secrets.token_hex(16)


def home_of(fd: int) -> str:
    """Where a state directory is: what a rename keeps and a copy does not."""
    status = os.fstat(fd)
    return f"{status.st_dev}:{status.st_ino}"


def id_at(former: str, home: str) -> str:
    """The id of a state directory that had `former` elsewhere."""
    return hashlib.sha256(f"{former} {home}".encode()).hexdigest()[:32]


def new_private(directory: str) -> str:
    """The name of a directory of our own in one that others may be able to write to."""
    return os.path.join(directory, f"{PREFIX}{secrets.token_hex(8)}")


def make_private(path: str) -> None:
    """Make the directory.  StateError, OSError."""
    directory, name = os.path.split(path)
    parent = open_directory(directory)
    try:
        with naming(name, parent):
            os.mkdir(name, 0o700, dir_fd=parent)
            os.fsync(parent)
    finally:
        os.close(parent)


def open_private(path: str) -> int:
    """Open a directory of our own; StateError, and FileNotFoundError if only it is not there."""
    directory, name = os.path.split(path)
    parent = open_directory(directory)
    try:
        fd = os.open(
            name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent
        )
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StateError(f"{path}, for temp images, is no directory: {error.strerror}") from None
    finally:
        os.close(parent)
    try:
        status = os.fstat(fd)
        if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o077:
            raise StateError(
                f"the directory {path} with temp images must belong to user {os.geteuid()} and be "
                "closed to others; chown it, and chmod 700 it"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _remove_private(path: str) -> None:
    """Remove the directory if nothing is in it."""
    directory, name = os.path.split(path)
    try:
        parent = open_directory(directory)
        try:
            os.rmdir(name, dir_fd=parent)
        finally:
            os.close(parent)
    except (OSError, StateError):
        pass  # temp images are in it, or it is gone


def open_directory(path: str) -> int:
    """Open a directory for temp images; StateError that names the remedy."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StateError(
            f"the directory {path} for temp images does not exist; mount the file system "
            "that it is on first, or create it"
        ) from None
    except OSError as error:
        raise StateError(
            f"the directory {path} for temp images cannot be opened: {error.strerror}; "
            "choose another with -o temp-dir=DIR"
        ) from None
    try:
        status = os.fstat(fd)
        if status.st_uid not in (os.geteuid(), 0):
            raise StateError(
                f"the directory {path} for temp images belongs to user {status.st_uid}; "
                "chown it, or choose another with -o temp-dir=DIR"
            )
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            raise StateError(
                f"the directory {path} for temp images can be written by others; chmod go-w it"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


@define(eq=False)
class TempDirs:
    """The directories that temp images of one state directory are in.  All methods block.

    `new`: where those of new layers go, None: into the state directory.
    `former`: the id that older temp images may still have.
    """

    id: str
    new: str | None
    former: str | None = None
    _fds: dict[str, int] = field(factory=dict, init=False)

    def open(self, path: str) -> int:
        """The descriptor of a directory, kept open until `close`.

        Raises StateError, and FileNotFoundError if it is not there but the one that it is in.
        """
        if path not in self._fds:
            self._fds[path] = open_private(path)
        return self._fds[path]

    def opened(self) -> dict[str, int]:
        """The descriptors of the directories that were opened."""
        return dict(self._fds)

    def enter(self) -> None:
        """Make the directory for new temp images, if it is not there.  StateError, OSError."""
        if self.new is None:
            return
        try:
            self.open(self.new)
        except FileNotFoundError:
            make_private(self.new)
            self.open(self.new)

    def name(self, layer_id: int) -> str:
        """The file name of a temp image."""
        return f"{self.id}-{layer_id}.temp"

    def find(self, path: str, layer_id: int, whose: str) -> tuple[int, str]:
        """The place of a temp image that must be there.  Raises StateError."""
        name = self.name(layer_id)
        try:
            fd = self.open(path)
            try:
                os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                if self.former is None or not self._take_over(fd, layer_id):
                    raise
        except FileNotFoundError:
            raise StateError(
                f"the temp image {path}/{name} of {whose} is gone; if its file system is "
                "not mounted, mount that first, else put the file back (a copy of the state "
                "directory that was mounted has renamed it)"
            ) from None
        return fd, name

    def _take_over(self, fd: int, layer_id: int) -> bool:
        try:
            os.rename(
                f"{self.former}-{layer_id}.temp", self.name(layer_id), src_dir_fd=fd, dst_dir_fd=fd
            )
        except FileNotFoundError:
            return False
        os.fsync(fd)
        return True

    def remove_leftovers(self, path: str, listed: set[int]) -> list[str]:
        """Remove temp images of ours that are of no layer listed; says which.

        A directory that is not there has none that could be removed.
        """
        try:
            fd = self.open(path)
        except (FileNotFoundError, StateError):
            return []
        notices = []
        for name in os.listdir(fd):
            match = re.fullmatch(rf"{self.id}-([1-9][0-9]*)\.temp", name, re.ASCII)
            if match and int(match[1]) not in listed:
                statefiles.remove(fd, name)
                where = os.path.dirname(path)
                notices.append(f"removed what was left in {where} of snapshot number {match[1]}")
        return notices

    def close(self) -> None:
        """Close the directories, and remove those that are empty."""
        for path, fd in self._fds.items():
            os.close(fd)
            _remove_private(path)
        self._fds.clear()


def valid_path(path: str) -> bool:
    """Can a manifest name that directory?"""
    return os.path.isabs(path) and os.path.normpath(path) == path and "\0" not in path


def choose(
    wanted: str | None, state: str, recorded: str | None, used: Iterable[str | None]
) -> str | None:
    """The directory for new temp images, None: the state directory.

    `wanted`: what the option says: the one that it is in, or is to be made in.  Without it the
    `recorded` one stays while temp images that are `used` are there.
    """
    if wanted is None:
        return recorded if recorded in used else None
    path, inside = os.path.realpath(wanted), os.path.realpath(state)
    if path in (inside, os.path.join(inside, "snapshots")):
        return None
    # One that is not used may be another's by now, who has seen its name.
    there = (each for each in used if each is not None and os.path.dirname(each) == path)
    return next(there, None) or new_private(path)
