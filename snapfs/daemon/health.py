"""What is wrong with a mount, and what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import Literal

from attrs import frozen

from ..engine.engine import Engine
from ..engine.space import SpaceStatus
from .describe import timestamp

NAMED = 3  # snapshots or bitmaps that a message names
STALE_SECONDS = 60.0  # after which temp storage that does not answer is a problem


@frozen
class Problem:
    """One thing.  An `error` makes the mount unhealthy; a `warning` may become one.

    `kind`: internal, image, guest-writes, temp-space, temp-storage, lost, incomplete, bitmaps.
    """

    severity: Literal["error", "warning"]
    kind: str
    message: str
    remedy: str


def problems(engine: Engine, trouble: str | None, where: str, image: str) -> list[Problem]:
    """All that is known, errors first.

    `trouble`: why the FUSE face is not healthy, if it is not.  `where`: the mountpoint.
    """
    found = [*_general(engine, trouble, image), *_writes(engine, where, image)]
    space = engine.space.status()
    found += [*_space(engine, space, where), *_snapshots(engine, where), *_bitmaps(engine, where)]
    return sorted(found, key=lambda each: each.severity != "error")


def _general(engine: Engine, trouble: str | None, image: str) -> Iterator[Problem]:
    if trouble is not None:
        yield Problem(
            "error", "internal", trouble,
            "a bug: report it with the log; requests like that one fail until it is mounted again",
        )  # fmt: skip
    if engine.unhealthy is not None:
        yield Problem(
            "error", "image", engine.unhealthy,
            f"see to the storage of {image} and to who else writes it, then unmount, check the "
            "image, and mount it again; until then no snapshot can be made",
        )  # fmt: skip


def _writes(engine: Engine, where: str, image: str) -> Iterator[Problem]:
    failures = engine.write_failures
    if failures.newest is None:
        return
    count = engine.counters.write_errors
    text = f"{_count(count, 'write')} to active failed, the last at {timestamp(failures.newest_ns)}"
    reason = failures.newest.strerror or ""
    remedy = f"see to the storage of {image} and of the temp images"
    if failures.newest.errno == errno.ENOSPC:
        remedy = f"make room on the file system of {image}"
        if "temp" in reason:
            remedy = _make_room(where)
    yield Problem(
        "error" if failures.present else "warning", "guest-writes", f"{text}: {reason}",
        f"{remedy}; then check the file systems of the guest",
    )  # fmt: skip


def _make_room(where: str) -> str:
    return (
        "delete snapshots, make room on the file system of the temp images, or raise the limit "
        f"(snapfs limit {where} SIZE)"
    )


def _space(engine: Engine, space: SpaceStatus, where: str) -> Iterator[Problem]:
    live = any(layer.live for layer in engine.layers)
    if space.age is None or space.age > STALE_SECONDS:
        since = "has never answered" if space.age is None else f"is silent for {space.age:.0f} s"
        yield Problem(
            "error" if live else "warning", "temp-storage",
            f"the storage of the temp images {since}",
            "see to it; writes that need a copy wait, or fail, meanwhile",
        )  # fmt: skip
    elif space.room < engine.geometry.cluster_size:
        needed = engine.needs_copies()
        consequence = "the next copies fail" if needed else "a new snapshot could keep nothing"
        yield Problem(
            "error" if needed else "warning", "temp-space",
            f"no room is left for temp images: {consequence}", _make_room(where),
        )  # fmt: skip
    elif space.warning is not None and live:
        left = ""
        if space.seconds_left is not None:
            left = f", and full in {space.seconds_left:.0f} s at the present rate"
        yield Problem(
            "warning", "temp-space", f"temp images take {space.warning} % of their room{left}",
            _make_room(where),
        )  # fmt: skip


def _snapshots(engine: Engine, where: str) -> Iterator[Problem]:
    for state, remedy in (
        ("lost", "delete it, and take and back up a new one"),
        ("incomplete", "what of it can be read is right; delete it, and take a new one"),
    ):
        found = [layer for layer in engine.snapshots if layer.state == state]
        if found:
            names = _named([layer.name or "" for layer in found])
            verb = "is" if len(found) == 1 else "are"
            yield Problem(
                "error", state,
                f"{_count(len(found), 'snapshot')} {verb} {state} ({names}): {found[0].reason}",
                f"{remedy} (snapfs delete {where} NAME)",
            )  # fmt: skip


def _bitmaps(engine: Engine, where: str) -> Iterator[Problem]:
    found = [bitmap for bitmap in engine.tracker.bitmaps if bitmap.parts is None]
    if found:
        verb = "is" if len(found) == 1 else "are"
        names = _named([bitmap.name for bitmap in found])
        yield Problem(
            "error", "bitmaps",
            f"{_count(len(found), 'bitmap')} {verb} inconsistent ({names}): {found[0].reason}",
            f"the next backup is a full one; or begin anew: snapfs bitmap clear {where} NAME",
        )  # fmt: skip


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _named(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
