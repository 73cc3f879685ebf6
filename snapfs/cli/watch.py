"""`snapfs status --watch`: a mount, live, with a heat map of its image."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from types import FrameType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from ..client import everywhere
from ..client.documents import document
from ..client.older import complete_status
from ..client.wire import Client
from ..errors import NotMounted, UsageError
from . import report
from .heatmap import LOOKS, cells
from .output import human
from .terminal import Painter, printable, wants_colour

SECONDS = 1.0  # between two looks
READ_LOOKS = 3  # that a region counts as being read after it was
MOST_PROBLEMS = 3
LEAST_MAP = 4  # rows
INDENT = 8

Status = Mapping[str, Any]


class Looks:
    """The newest answers of a daemon, and what has changed between them."""

    def __init__(self) -> None:
        self.status: Status | None = None
        self.regions: Status | None = None
        self.now: datetime = report.current()
        self._before: tuple[float, Status] | None = None
        self._newest: tuple[float, Status] | None = None
        self._reads: list[Sequence[int]] = []  # of the last looks, the oldest first

    def add(self, status: Status, regions: Status, when: float) -> None:
        """Another look; `when`: seconds of any clock that goes on."""
        self._before, self._newest = self._newest, (when, status)
        if self.regions is not None:
            self._reads = [*self._reads, self.regions["reads"]][-READ_LOOKS:]
        self.status, self.regions, self.now = status, regions, report.current()

    def reads_before(self) -> Sequence[int]:
        """Reads by region that are not lately any more; at the first look none is."""
        if self._reads:
            return self._reads[0]
        return self.regions["reads"] if self.regions is not None else ()

    def rate(self, part: str, key: str) -> float:
        """How much a number of status grew in a second."""
        if self._before is None or self._newest is None:
            return 0.0
        (then, old), (now, new) = self._before, self._newest
        passed = now - then
        return max(0.0, (new[part][key] - old[part][key]) / passed) if passed > 0 else 0.0


class Screen:
    """What `Live` shows: as much as fits, with the map in what is left."""

    def __init__(self, looks: Looks) -> None:
        self._looks = looks

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, options.height or console.height
        ascii_only = not options.encoding.startswith("utf")
        for line in screen(self._looks, width, height, ascii_only):
            line.no_wrap, line.overflow = True, "crop" if ascii_only else "ellipsis"
            yield line


def screen(looks: Looks, width: int, height: int, ascii_only: bool = False) -> Iterator[Text]:
    """The lines of a screen, `height` of them at most."""
    status, regions = looks.status, looks.regions
    if status is None or regions is None:
        yield Text("asking the daemon ...")
        return
    top = [*_head(status, looks.now), *_problems(status), *_numbers(status, looks, width)]
    legend = list(_legend(width, ascii_only))
    room = height - len(top) - len(legend) - 1  # for snapshots and map
    if room < LEAST_MAP:  # a tiny terminal: first things first
        legend = []
        room = height - len(top) - 1
    table = _snapshots(status, looks, width, max(0, room - max(LEAST_MAP, room // 2)))
    lines = top + table
    rows = height - len(lines) - len(legend) - 1
    if rows > 0:
        lines += [*_map(looks, regions, width, rows, ascii_only), *legend]
    yield from lines[:height]


def _head(status: Status, now: datetime) -> Iterator[Text]:
    mount, image = status["mount"], status["image"]
    good = mount["healthy"]
    yield Text.assemble(
        (printable(mount["mountpoint"]), "bold"), "  ",
        ("healthy", "green") if good else ("NOT HEALTHY", "bold red"),
        f"  {now:%H:%M:%S} UTC",
    )  # fmt: skip
    yield Text(
        f"{human(image['size'])}, mounted for {report.age(mount['since'], now)}, "
        f"{printable(image['path'])}"
    )


def _problems(status: Status) -> Iterator[Text]:
    problems = status["problems"]
    for problem in problems[:MOST_PROBLEMS]:
        style = "red" if problem["severity"] == "error" else "yellow"
        yield Text(f"{problem['severity']}: {printable(problem['message'])}", style)
    if len(problems) > MOST_PROBLEMS:
        yield Text(f"and {len(problems) - MOST_PROBLEMS} more", "yellow")
    if problems:
        yield Text(f"what to do: {printable(problems[0]['remedy'])}")


def _numbers(status: Status, looks: Looks, width: int) -> Iterator[Text]:
    space, times, counters = status["temp"], status["copies"], status["counters"]
    total = space["used_bytes"] + space["room_bytes"]
    share = 100 * space["used_bytes"] / total if total else 100.0
    text = f"{human(space['used_bytes'])} of {human(total)}"
    if space["seconds_left"] is not None:
        text += f", full in {report.duration(space['seconds_left'])}"
    style = {80: "yellow", 95: "red"}.get(space["warning_percent"], "green")
    bar = max(0, min(30, width - INDENT - len(text) - 10))
    yield _fact("Temp", Text.assemble(
        (report.bar(share, bar - 2) + " " if bar > 6 else "", style), f"{share:.0f} %  {text}"
    ))  # fmt: skip

    count, took = looks.rate("copies", "count"), looks.rate("copies", "seconds")
    text = f"{looks.rate('counters', 'cbw_copies'):.0f} clusters/s, "
    text += f"{human(round(looks.rate('counters', 'cbw_bytes')))}/s"
    if count:
        text += f", {report.seconds(took / count)} each"
    if times["count"]:
        text += f"; 99 % within {report.seconds(report.within(times['buckets'], 0.99))}"
    if counters["cbw_errors"]:
        text += f"; {counters['cbw_errors']} failed"
    yield _fact("Copies", Text(text))

    files = status["open"]
    yield _fact("Use", Text(
        f"{looks.rate('counters', 'reads'):.0f} reads/s, "
        f"{looks.rate('counters', 'writes'):.0f} writes/s, snapshots "
        f"{looks.rate('counters', 'snapshot_reads'):.0f} reads/s; "
        f"open: {files['writers']} for writing, {files['readers']} for reading"
    ))  # fmt: skip


def _fact(label: str, text: Text) -> Text:
    return Text.assemble((f"{label:{INDENT}}", "bold"), text)


def _snapshots(status: Status, looks: Looks, width: int, most: int) -> list[Text]:
    """A table of `most` lines: those that are not ok, and the newest ones."""
    snapshots = status["snapshots"]
    if most < 2 or not snapshots:
        return [Text("no snapshots", "dim")] if most > 0 and not snapshots else []
    bad = [each for each in snapshots if each["state"] != "ok"]
    good = [each for each in snapshots if each["state"] == "ok"]
    room = most - 1 - (len(snapshots) > most - 1)
    shown = (good + bad)[-room:] if room else []
    shown.sort(key=lambda each: int(each["id"]))
    plain = Painter(False)
    lines = [Text(line) for line in report.snapshot_table(shown, plain, width, looks.now)]
    lines[0].stylize("dim")
    for line, each in zip(lines[1:], shown, strict=True):
        if each["state"] != "ok":
            line.stylize("red")
    if len(shown) < len(snapshots):
        lines.append(Text(f"and {len(snapshots) - len(shown)} more", "dim"))
    return lines


def _map(looks: Looks, regions: Status, width: int, rows: int, ascii_only: bool) -> list[Text]:
    found = cells(regions, width * rows, looks.reads_before())
    if not found:
        return [Text("the image is empty", "dim")]
    one = human(found[0].stop - found[0].start)
    lines = [Text(f"Image, {one} a cell", "bold")]
    for start in range(0, len(found), width):
        line = Text()
        for cell in found[start : start + width]:
            line.append(cell.glyph(ascii_only), LOOKS[cell.kind].style)
        lines.append(line)
    return lines[: rows + 1]


def _legend(width: int, ascii_only: bool) -> Iterator[Text]:
    """What the marks mean, in as few lines as it takes."""
    line = Text()
    for look in LOOKS.values():
        entry = Text.assemble(
            (look.ascii if ascii_only else look.glyph, look.style), " ", look.words
        )
        if line and len(line) + 2 + len(entry) > width:
            yield line
            line = Text()
        line.append("  " if line else "")
        line.append_text(entry)
    yield line


# The command


def watch(arguments: argparse.Namespace) -> int:
    """Show a mount until interrupted, or until it is gone: lines where there is no terminal."""
    mountpoint = arguments.mountpoint if arguments.mountpoint is not None else _only_mount()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupted)
    with Client(mountpoint) as client:
        if arguments.json or not sys.stdout.isatty():
            return _lines(client, as_json=arguments.json)
        return _live(client, arguments.color)


def _only_mount() -> str:
    found = everywhere.mounts()
    if not found:
        raise NotMounted("no snapfs is mounted")
    if len(found) > 1:
        names = ", ".join(each.mountpoint for each in found)
        raise UsageError(f"--watch shows one mount; say which: {names}")
    return found[0].mountpoint


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _live(client: Client, colour: str) -> int:
    console = Console(
        color_system="auto" if wants_colour(colour) else None, no_color=not wants_colour(colour),
        highlight=False,
    )  # fmt: skip
    looks = Looks()
    with Live(Screen(looks), console=console, screen=True, refresh_per_second=4):
        while True:  # it draws in a thread, also while we wait, and sees another size at once
            looks.add(*_look(client), time.monotonic())
            time.sleep(SECONDS)


def _look(client: Client) -> tuple[Status, Status]:
    return complete_status(client.call("status")), client.call("regions")


def _lines(client: Client, *, as_json: bool) -> int:
    looks = Looks()
    while True:
        status, regions = _look(client)
        looks.add(status, regions, time.monotonic())
        if as_json:
            line = {"message_type": "status", **status, "regions": regions}
            print(json.dumps(document("status", line)), flush=True)
        else:
            print(_line(status, looks), flush=True)
        time.sleep(SECONDS)


def _line(status: Status, looks: Looks) -> str:
    mount, space = status["mount"], status["temp"]
    state = "healthy" if mount["healthy"] else f"not healthy: {printable(mount['reason'])}"
    return (
        f"{looks.now:%Y-%m-%d %H:%M:%S}Z {printable(mount['mountpoint'])} {state}; "
        f"snapshots {len(status['snapshots'])}, temp {human(space['used_bytes'])} of "
        f"{human(space['used_bytes'] + space['room_bytes'])}, "
        f"{looks.rate('counters', 'cbw_copies'):.0f} copies/s, "
        f"{looks.rate('counters', 'writes'):.0f} writes/s"
    )
