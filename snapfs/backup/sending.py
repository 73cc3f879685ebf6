"""`snapfs send`: a snapshot, or what changed up to it, as a stream on a descriptor.

The last record is written only when the snapshot was ok to the end: so whoever receives it
calls nothing whole that we cannot vouch for.
"""

from __future__ import annotations

import os
import re
from typing import Any

from attrs import frozen

from ..errors import PartialCopy, SnapshotIncomplete, UsageError, WrongBase
from .copying import Copying, describe_ranges
from .extents import Extents
from .moments import Changes, Moment, changes
from .plan import Kind, Plan, within
from .progress import Progress
from .source import Source
from .stream import VERSION, Header, StreamTarget

_CUT = "; the stream ends without its end"
NOTHING = "none"  # where there is no image yet
_STATE = re.compile(r"(complete|partial)@([0-9TZ:.+-]+?)(?:/(\d+))?")


@frozen
class SendOptions:
    """What the command line says.  `resume`: what `snapfs receive --state` printed."""

    since: str | None = None
    resume: str | None = None
    bytes_per_second: int | None = None
    progress_fd: int | None = None
    json: bool = False
    quiet: bool = False


def send(snapshot: str, fd: int, options: SendOptions) -> dict[str, Any]:
    """Write a snapshot, or what changed since something, to a descriptor; returns the summary."""
    if os.isatty(fd):
        raise UsageError(
            "a stream is nothing for a terminal; give it to a program: snapfs send SNAPSHOT | "
            "ssh HOST snapfs receive IMAGE"
        )
    with Source(snapshot) as source:
        moment = Moment(source.described["created"], source.size)
        since = None
        if options.since is not None:
            since = changes(source.mountpoint, source.name, options.since)
            if since.base is None:
                raise UsageError(
                    f"{since.since} was made by an older snapfs, and nobody knows what it begins "
                    "at; clear it, and send everything once"
                )
        start = _start(options.resume, moment, since)
        plan = _plan(source, since, start)
        header = Header(
            VERSION,
            image=source.image["path"],
            host=os.uname().nodename,
            snapshot=source.name,
            moment=moment,
            size=source.size,
            start=start,
            data_bytes=plan.total(Kind.DATA),
            base=None if since is None else since.base,
        )
        target = StreamTarget(fd, header)
        _copy(source, target, plan, options)
        _refuse_changed(source, limited=_is_limited(source, since))
        target.finish()
    totals = target.totals
    return {
        "snapshot": source.name,
        "created": moment.created,
        "size": source.size,
        "since": None if since is None else since.since,
        "sent_bytes": totals.data_bytes,
        "zero_bytes": totals.zero_bytes,
        "resumed_at": start,
    }


def state_of(kind: str, moment: Moment, position: int | None = None) -> str:
    """What `--resume-from` takes: one word."""
    return f"{kind}@{moment.created}" + ("" if position is None else f"/{position}")


def _start(resume: str | None, moment: Moment, since: Changes | None) -> int:
    """Bytes that IMAGE has already; raises WrongBase if it cannot take what we would send."""
    if resume is None or resume == NOTHING:
        if resume is not None and since is not None:
            raise WrongBase(
                f"there is no image yet that could take what changed since {since.since}; send "
                "everything, without --since"
            )
        return 0
    found = _STATE.fullmatch(resume)
    try:
        if found is None or (found[1] == "partial") != (found[3] is not None):
            raise ValueError
        there = Moment(found[2])
    except ValueError:
        raise UsageError(
            f"--resume-from takes what snapfs receive --state IMAGE prints, not {resume!r}"
        ) from None
    if there.is_same(moment):
        size = moment.size or 0
        return size if found[3] is None else min(int(found[3]), size)
    if found[3] is not None:
        raise WrongBase(
            f"the image there has got a part of the snapshot of {there.created}; finish that, or "
            "send everything, without --resume-from, and have snapfs receive --force take it"
        )
    if since is not None and since.base is not None and not since.base.is_same(there):
        raise WrongBase(
            f"the image there is at {there.created}, and {since.since} is of "
            f"{since.base.created}; send what changed since the former, or everything"
        )
    return 0


def _plan(source: Source, since: Changes | None, start: int) -> Plan:
    """What is sent; raises SnapshotIncomplete or PartialCopy if some of it may not be read."""
    plan = source.plan(start)
    if since is not None:
        wanted = Extents(since.changed)
        for first, stop in since.unknown:
            wanted.add(first, stop)
        missing = Extents((first, stop) for first, stop, kind in plan if kind is Kind.MISSING)
        if _is_limited(source, since) and not _given_up(source.described):
            # What had changed by then is just what may be read; the rest changed later.
            for first, stop in missing:
                wanted.remove(first, stop)
        left_out = [each for gap in missing for each in wanted.inside(*gap)]
        plan = within(plan, wanted)
    else:
        left_out = [(first, stop) for first, stop, kind in plan if kind is Kind.MISSING]
    if left_out:
        _refuse(source, [(first, stop - first) for first, stop in left_out])
    return plan


def _is_limited(source: Source, since: Changes | None) -> bool:
    """Does the snapshot give access to just what had changed since?"""
    if since is None or since.bitmap is None:
        return False
    return bool(source.described["bitmap"] == since.bitmap)


def _given_up(described: dict[str, Any]) -> int:
    counts = described["clusters"]
    return int(counts["lost"]) + int(counts["discarded"])


def _refuse(source: Source, missing: list[tuple[int, int]]) -> None:
    what = f"{describe_ranges(missing)} (offset+length) of {source.name}"
    state, reason = source.described["state"], source.described["reason"]
    if state != "ok":
        raise SnapshotIncomplete(
            f"snapshot {source.name} is {state} ({reason}), and misses {what}; send a newer one"
        )
    raise PartialCopy(
        f"{what} may not be read, so it would not be the whole image; send what its bitmap has, "
        "with --since, or a snapshot that has everything"
    )


def _copy(source: Source, target: StreamTarget, plan: Plan, options: SendOptions) -> None:
    total = plan.total(Kind.DATA) + plan.total(Kind.ZERO)
    with Progress(source.name, total, options, "send") as progress:
        copying = Copying(
            source,
            target,
            durable=lambda position: None,
            progress=progress.advance,
            bytes_per_second=options.bytes_per_second,
        )
        copying.copy(plan)
    if copying.copied.missing and source.look()["state"] == "ok":
        raise PartialCopy(
            f"somebody discarded {describe_ranges(copying.copied.missing)} (offset+length) of "
            f"{source.name} while it was sent{_CUT}"
        )


def _refuse_changed(source: Source, *, limited: bool) -> None:
    """Raises what keeps the stream from being what it began as.

    `limited`: what could not be read when it was planned had not been discarded then.
    """
    now = source.look()
    if now["created"] != source.described["created"]:
        raise PartialCopy(f"snapshot {source.name} was replaced while it was sent{_CUT}")
    if now["state"] != "ok":
        raise SnapshotIncomplete(
            f"snapshot {source.name} became {now['state']} while it was sent "
            f"({now['reason']}){_CUT}"
        )
    if limited and _given_up(now):
        raise PartialCopy(f"somebody discarded parts of {source.name} while it was sent{_CUT}")
