"""What a check of the state directory finds, how it looks, and how it repairs.

A finding has one of these grades:

    note        nothing to do about
    leftover    the next mount cleans it up, and so does a repair where it can
    repairable  a mount is refused; a repair puts it right without a guess
    lost        a snapshot or bitmap that cannot be used, or only in part
    damage      a mount is refused, and what to do is the user's decision

All functions block.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial

from attrs import define, field, frozen

from ..errors import ExitCode, StateError
from . import statefiles

Repair = Callable[[], object]


class Grade(StrEnum):
    """How bad a finding is; see the module's text."""

    NOTE = "note"
    LEFTOVER = "leftover"
    REPAIRABLE = "repairable"
    LOST = "lost"
    DAMAGE = "damage"


@frozen
class Finding:
    """One thing found.  `where`: a path in the state directory; printable, as `text` is."""

    grade: Grade
    where: str
    text: str
    repaired: bool = False


@define
class Report:
    """What a check found.  `image`: where it was looked for; `clean`: unmounted in order."""

    directory: str
    image: str | None = None
    clean: bool | None = None
    snapshots: int = 0
    bitmaps: int = 0
    findings: list[Finding] = field(factory=list)

    @property
    def exit_code(self) -> ExitCode:
        """OK: sound; PARTIAL: repaired, or needs no decision; SNAPSHOT_UNUSABLE: anything worse."""
        grades = {finding.grade for finding in self.findings}
        if grades & {Grade.LOST, Grade.DAMAGE}:
            return ExitCode.SNAPSHOT_UNUSABLE
        return ExitCode.PARTIAL if grades - {Grade.NOTE} else ExitCode.OK


class Unusable(Exception):
    """What was asked for cannot be looked at; it has been reported."""


def printable(text: str) -> str:
    """No byte of a hostile file reaches a terminal as a control character."""
    return "".join(c if c.isprintable() else c.encode("unicode-escape").decode() for c in text)


class Inspector:
    """Looks at the files of one directory.  `fd` is of it, and the caller's."""

    def __init__(self, directory: str, fd: int, repair: bool) -> None:
        self.report = Report(printable(directory))
        self.directory = directory
        self.fd = fd
        self.repair = repair

    def found(self, grade: Grade, where: str, text: str, repair: Repair | None = None) -> None:
        """Report, after the repair if there is one and it is wanted."""
        repaired = False
        if repair is not None and self.repair:
            try:
                repair()
                repaired = True
            except (OSError, StateError) as error:
                why = error.strerror if isinstance(error, OSError) else str(error)
                grade, text = Grade.DAMAGE, f"{text}; it cannot be repaired: {why}"
        self.report.findings.append(Finding(grade, printable(where), printable(text), repaired))

    # Opening

    def open(self, parent: int, name: str, where: str, *, kind: str = "file") -> int:
        """Open to read what must be ours; FileNotFoundError, or Unusable for anything else."""
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        wanted = stat.S_ISDIR if kind == "directory" else stat.S_ISREG
        if not wanted(mode):
            what = "a symbolic link" if stat.S_ISLNK(mode) else f"not a {kind}"
            self.found(Grade.DAMAGE, where, f"is {what}")
            raise Unusable
        try:
            flags = os.O_RDWR if name == "lock" else os.O_RDONLY
            fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        except FileNotFoundError:
            raise
        except OSError as error:
            self.found(Grade.DAMAGE, where, f"cannot be opened: {error.strerror}")
            raise Unusable from None
        try:
            self.check_status(fd, where, wanted)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def check_status(self, fd: int, where: str, wanted: Callable[[int], bool]) -> None:
        status = os.fstat(fd)
        wrong = None
        if not wanted(status.st_mode):
            wrong = "was replaced while it was looked at"
        elif stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            wrong = "has another name as well (a hard link); replace it by a copy of its own"
        elif status.st_uid not in (os.geteuid(), 0):
            wrong = f"belongs to user {status.st_uid}; chown it if that is right"
        if wrong is not None:
            self.found(Grade.DAMAGE, where, wrong)
            raise Unusable
        if status.st_mode & 0o022:
            narrow = stat.S_IMODE(status.st_mode) & ~0o022
            self.found(
                Grade.REPAIRABLE, where, "can be written by others", partial(os.fchmod, fd, narrow)
            )

    @contextmanager
    def opened(self, parent: int, name: str, where: str, kind: str = "file") -> Iterator[int]:
        fd = self.open(parent, name, where, kind=kind)
        try:
            yield fd
        finally:
            os.close(fd)

    def leftover(self, parent: int, name: str, where: str, text: str) -> None:
        remove = partial(statefiles.remove_tree, name, parent=parent)
        self.found(Grade.LEFTOVER, where, text, remove)


def read_all(fd: int, size: int) -> bytearray:
    """The first `size` bytes, or up to the end."""
    data = bytearray()
    while len(data) < size:
        piece = os.pread(fd, min(size - len(data), 1 << 24), len(data))
        if not piece:
            break
        data += piece
    return data


def overwrite(directory: int, name: str, offset: int, data: bytes) -> None:
    fd = statefiles.open_file(directory, name)
    try:
        os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def make_empty(directory: int, name: str, size: int) -> None:
    fd = statefiles.make_file(directory, name, size)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.fsync(directory)
