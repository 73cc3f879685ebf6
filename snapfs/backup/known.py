"""Which directories backups went to: so that a bitmap can be told from its name.

    $XDG_STATE_HOME/snapfs/backups.json, of each user

A bitmap has the id of its directory in its name, and its directory may be on a disk that lies
in a cupboard.  The file is advice: without it, or where it cannot be written, nothing is known.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from attrs import evolve, field, frozen

from ..errors import BackupError
from . import records
from .chain import Chain, Directory, split_label
from .devices import state_directory

VERSION = 1
NAME = "backups.json"


@frozen
class Place:
    """Where a directory was when it was used last, and when bitmaps began, by their tokens."""

    path: str
    bitmaps: dict[str, str] = field(factory=dict)


@frozen
class _File:
    version: int
    places: dict[str, Place] = field(factory=dict)


records.register(Place, _File)


def _where() -> str:
    return os.path.join(state_directory(), NAME)


def _read() -> dict[str, Place]:
    try:
        with open(_where(), "rb") as file:
            return records.structure(file.read(), _File, _where(), VERSION).places
    except (OSError, BackupError):
        return {}


def note(directory: Directory, token: str, created: str) -> None:
    """Record where a directory is, and when the bitmap with that token began."""
    chain = directory.chain
    live = {each.token for each in (*chain.points[-1:], chain.begun) if each is not None}
    with suppress(OSError), _writing():
        places = _read()
        before = places.get(chain.id, Place(directory.path)).bitmaps
        bitmaps = {each: time for each, time in before.items() if each in live} | {token: created}
        places = places | {chain.id: Place(directory.path, bitmaps)}
        records.replace_durably(
            _where(), records.unstructure(evolve(_File(VERSION), places=places))
        )


@contextmanager
def _writing() -> Iterator[None]:
    os.makedirs(state_directory(), mode=0o700, exist_ok=True)
    fd = os.open(state_directory(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def about(bitmap: str, places: dict[str, Place] | None = None) -> dict[str, Any] | None:
    """Of which directory a bitmap is, None if it is of none.

    `directory` and `time`, when it began, are None if that is not known; `there`: is it the
    directory's own manifest that is found at that path now.
    """
    found = split_label(bitmap)
    if found is None:
        return None
    identity, token = found
    place = (_read() if places is None else places).get(identity)
    if place is None:
        return {"id": identity, "directory": None, "time": None, "there": False}
    chain = _chain_at(place.path)
    there = chain is not None and chain.id == identity
    time = place.bitmaps.get(token)
    if time is None and chain is not None and there:
        time = next((point.created for point in chain.points if point.token == token), None)
    return {"id": identity, "directory": place.path, "time": time, "there": there}


def _chain_at(path: str) -> Chain | None:
    try:
        return Directory(path).chain
    except (OSError, BackupError):
        return None
