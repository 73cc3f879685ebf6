"""`snapfs status` for people: what is wrong and what to do about it first, then the facts."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from .output import human
from .terminal import Painter, printable

Status = Mapping[str, Any]

LABEL = 12  # columns of what a fact is called
MOST_SNAPSHOTS = 20  # that status lists; `snapfs list` has them all
BAR = 20
ENDLESS = 1 << 20  # where there is no terminal: a line each
NARROWEST = 16  # terminal that lines are made for


def report(
    status: Status, painter: Painter, width: int | None, now: datetime, users: Sequence[str] = ()
) -> Iterator[str]:
    """The lines about one mount, for a terminal of that width, None: it is none.

    `users`: processes that use the mount, in words, as far as that is known.
    """
    width = None if width is None else max(width, NARROWEST)
    mount = status["mount"]
    state = (
        painter("healthy", "green") if mount["healthy"] else painter("NOT HEALTHY", "red", "bold")
    )
    yield f"{painter(printable(mount['mountpoint']), 'bold')}: {state}"
    for problem in status["problems"]:
        yield from _problem(problem, painter, width or ENDLESS)
    for label, text in _facts(status, now, users, width is not None):
        yield from _wrapped(label, text, width or ENDLESS)
    snapshots = status["snapshots"]
    if snapshots:
        yield ""
        yield from snapshot_table(snapshots[-MOST_SNAPSHOTS:], painter, width, now)
        if len(snapshots) > MOST_SNAPSHOTS:
            yield f"and {len(snapshots) - MOST_SNAPSHOTS} older ones; snapfs list shows all"


def _problem(problem: Status, painter: Painter, width: int) -> Iterator[str]:
    colour = "red" if problem["severity"] == "error" else "yellow"
    text = f"{printable(problem['severity'])}: {printable(problem['message'])}"
    lines = textwrap.wrap(text, width - 2, subsequent_indent="  ", break_on_hyphens=False)
    yield from (f"  {painter(line, colour)}" for line in lines)
    yield from textwrap.wrap(
        f"what to do: {printable(problem['remedy'])}", width - 2,
        initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False,
    )  # fmt: skip


def _wrapped(label: str, text: str, width: int) -> Iterator[str]:
    if width < 4 * LABEL:  # no room for two columns
        yield from textwrap.wrap(f"{label}: {text}", width, subsequent_indent="  ")
        return
    yield from textwrap.wrap(
        text, width, initial_indent=f"{label:{LABEL}}", subsequent_indent=" " * LABEL,
        break_on_hyphens=False,
    )  # fmt: skip


def _facts(
    status: Status, now: datetime, users: Sequence[str], terminal: bool
) -> Iterator[tuple[str, str]]:
    image, mount, counters = status["image"], status["mount"], status["counters"]
    yield (
        "Image",
        (
            f"{printable(image['path'])}, {human(image['size'])}, "
            f"clusters of {human(image['cluster_size'])}"
        ),
    )
    fast = "on" if mount["fastpath"] else "off"
    yield (
        "Mounted",
        (
            f"for {age(mount['since'], now)}, since {moment(mount['since'])}; "
            f"process {mount['pid']}, durability={printable(mount['durability'])}, fast path {fast}"
        ),
    )
    yield "Temp space", temp(status["temp"], terminal)
    yield "Copies", copies(status)
    yield (
        "Requests",
        (
            f"{counters['reads']} reads and {counters['writes']} writes of active, "
            f"{counters['snapshot_reads']} reads of snapshots; "
            f"{fast_share(counters)} on the fast path"
        ),
    )
    yield "Open", _open(status["open"], users)
    for bitmap in status["bitmaps"]:
        what = f"inconsistent: {bitmap['reason']}" if bitmap["inconsistent"] else (
            f"{human(bitmap['count'])} dirty"
        )  # fmt: skip
        yield "Bitmap", f"{printable(bitmap['name'])}: {printable(what)}"
    yield "Snapshots", str(len(status["snapshots"]) or "none")


def temp(space: Status, terminal: bool) -> str:
    """Temp space against its limit, and when it is full."""
    used, limit, room = space["used_bytes"], space["limit_bytes"], space["room_bytes"]
    total = used + room
    share = 100 * used / total if total else 100.0
    text = f"{bar(share, BAR)} " if terminal else ""
    text += f"{human(used)} of {human(total)} ({share:.0f} %)"
    text += ", which is what is free" if limit is None else f", limit {human(limit)}"
    text += f", in {printable(space['directory'])}"
    if space["bytes_per_second"]:
        text += f"; grows by {human(space['bytes_per_second'])}/s"
    if space["seconds_left"] is not None:
        text += f", full in {duration(space['seconds_left'])}"
    return text


def copies(status: Status) -> str:
    """How many copies, how large, and how long they took."""
    counters, times = status["counters"], status["copies"]
    if not times["count"]:
        return "none yet"
    text = f"{counters['cbw_copies']} clusters, {human(counters['cbw_bytes'])}"
    text += f", {seconds(times['seconds'] / times['count'])} for one copy on average"
    for share in (50, 99):
        text += f", {share} % within {seconds(within(times['buckets'], share / 100))}"
    if counters["cbw_errors"]:
        text += f"; {counters['cbw_errors']} failed"
    return text


def within(buckets: Sequence[Sequence[float | None]], share: float) -> float | None:
    """The bound within which that share of copies was, None if it is beyond the last."""
    total = buckets[-1][1] or 0
    return next((bound for bound, count in buckets if (count or 0) >= share * total), None)


def fast_share(counters: Status) -> str:
    """The share of requests that native code answered."""
    total = counters["reads"] + counters["writes"] + counters["snapshot_reads"]
    return f"{100 * counters['fastpath_requests'] / total:.0f} %" if total else "none"


def _open(files: Status, users: Sequence[str]) -> str:
    text = f"{files['writers']} for writing, {files['readers']} for reading"
    if users:
        shown = ", ".join(map(printable, users[:5]))
        text += f"; by {shown}" + (f" and {len(users) - 5} more" if len(users) > 5 else "")
    return text


# The table of snapshots

_Columns = tuple[tuple[str, int], ...]  # heads, and how soon a column goes in want of room

COLUMNS: _Columns = (
    ("NAME", 0), ("AGE", 1), ("STATE", 0), ("COPIED", 2), ("READABLE", 3), ("DISCARDED", 4),
    ("LOST", 2), ("TEMP", 1), ("OPEN", 4),
)  # fmt: skip


def snapshot_row(snapshot: Status, now: datetime) -> list[str]:
    """A snapshot's cells, for COLUMNS."""
    clusters = snapshot["clusters"]
    total = clusters["total"]
    return [
        printable(snapshot["name"]),
        age(snapshot["created"], now),
        printable(snapshot["state"]),
        _share(clusters["copied"], total),
        _share(clusters["accessible"], total),
        _share(clusters["discarded"], total),
        _share(clusters["lost"], total),
        human(snapshot["temp_bytes"]),
        str(snapshot["open"]),
    ]


def snapshot_table(
    snapshots: Sequence[Status], painter: Painter, width: int | None, now: datetime
) -> Iterator[str]:
    """The lines of a table, with as many columns as there is room for."""
    heads = [head for head, _ in COLUMNS]
    rows = [snapshot_row(each, now) for each in snapshots]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    shown = list(range(len(heads)))
    for priority in (4, 3, 2, 1):
        if width is not None and sum(widths[i] + 2 for i in shown) - 2 > width:
            shown = [i for i in shown if COLUMNS[i][1] < priority]
    for number, cells in enumerate([heads, *rows]):
        line = "  ".join(
            cells[i].ljust(widths[i]) if i in (0, 2) else cells[i].rjust(widths[i]) for i in shown
        )
        bad = number and cells[2] != "ok"
        line = line if width is None else line[:width]
        yield painter(line.rstrip(), *(["red"] if bad else [] if number else ["dim"]))


def _share(part: int, total: int) -> str:
    if not (part and total):
        return "0 %"
    percent = 100 * part / total
    return "<1 %" if percent < 1 else f"{percent:.0f} %" if part < total else "100 %"


# Words for numbers


def bar(percent: float, width: int) -> str:
    """A bar of that width."""
    full = min(width, round(width * percent / 100))
    return "[" + "#" * full + "." * (width - full) + "]"


def moment(text: str | None) -> str:
    """A time of JSON for people: 2026-11-30 12:00:00Z; ? if it is not known."""
    return "?" if text is None else text[:19].replace("T", " ") + "Z"


def age(text: str | None, now: datetime) -> str:
    """How long ago a time of JSON was; ? if it is not known."""
    if text is None:
        return "?"
    passed = (now - datetime.fromisoformat(text)).total_seconds()
    return duration(max(0.0, passed))


def duration(length: float) -> str:
    """Seconds in the unit that says enough: 12 s, 5 min, 3 h, 4 d."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if length >= 2 * size:
            return f"{length / size:.0f} {unit}"
    return f"{length:.0f} s"


def seconds(length: float | None) -> str:
    """A short time: 30 us, 1.5 ms, 2 s."""
    if length is None:
        return "more than 10 s"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if length >= 0.9995 * size:
            return f"{length / size:.3g} {unit}"
    return f"{length * 1e6:.0f} us"


def current() -> datetime:
    """Now, in UTC."""
    return datetime.now(UTC)
