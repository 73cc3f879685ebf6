"""Maps and bitmaps: map, diff, bitmap."""

from __future__ import annotations

import argparse
import heapq
import itertools
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, TextIO

from ..client import mountinfo
from ..client.naming import split_names
from ..client.wire import Client
from ..errors import ExitCode, UsageError
from .arguments import Verbs, add_json, add_words, file_of, only
from .guarding import Misused
from .output import dump, human, print_pairs, print_table


def add_to(verbs: Verbs) -> None:
    """Add our commands."""
    verb = verbs.add_parser("map", help="list the extents of active or of a snapshot")
    add_words(verb, "FILE", "or MOUNTPOINT NAME of a snapshot")
    verb.add_argument("--bitmap", metavar="B", help="dirty is what this one says, not any")
    verb.add_argument("--totals", action="store_true", help="sums instead of extents")
    verb.add_argument(
        "--svg", metavar="PICTURE", help="a heat map of the image FILE, or MOUNTPOINT, is of"
    )
    add_json(verb)
    verb.set_defaults(run=map_file)

    verb = verbs.add_parser("diff", help="list what differs between snapshots, or from now")
    add_words(
        verb,
        "MOUNTPOINT A [B]",
        "or paths of snapshots; default of B: the image now; with --since no A",
    )
    verb.add_argument(
        "--since", metavar="MOMENT", help="in place of A: a snapshot, a bitmap or DIR/POINT"
    )
    verb.add_argument(
        "--format", choices=("table", "json", "extents", "ddrescue"), help="default: table"
    )
    verb.add_argument("--totals", action="store_true", help="sums instead of extents")
    add_json(verb)
    verb.set_defaults(run=diff)

    _add_bitmap(verbs.add_parser("bitmap", help="track what changes, in dirty bitmaps"))


def _add_bitmap(verb: argparse.ArgumentParser) -> None:
    actions = verb.add_subparsers(
        title="actions", metavar="add|list|clear|merge|remove", required=True
    )
    for name, words, summary in (
        ("add", ("NAME",), "make a bitmap, which records from now on"),
        ("list", (), "list the bitmaps"),
        ("clear", ("NAME",), "empty a bitmap, or begin an inconsistent one again"),
        ("merge", ("SOURCE", "TARGET"), "add the clusters of one to another"),
        ("remove", ("NAME",), "remove a bitmap"),
    ):
        action = actions.add_parser(name, help=summary)
        text = "or paths MOUNTPOINT/bitmaps/NAME" if words else "of the bitmaps"
        add_words(action, " ".join(("MOUNTPOINT", *words)), text)
        add_json(action)
        action.set_defaults(run=bitmap, action=name, keys=[word.lower() for word in words])


# bitmap


def bitmap(arguments: argparse.Namespace) -> int:
    """snapfs bitmap ACTION MOUNTPOINT ...: 6 if one that is listed is inconsistent."""
    mount, names = split_names(arguments.words, "bitmaps")
    keys = arguments.keys
    only(names, len(keys), len(keys), " and ".join(keys).upper() or "no name")
    request = dict(zip(keys, names, strict=True))
    with Client(mount) as client:
        answer = client.call(f"bitmap_{arguments.action}", **request)
    command = f"bitmap {arguments.action}"
    if arguments.action != "list":
        if arguments.json:
            dump(command, {"bitmap": answer})
        return ExitCode.OK
    for each in answer["bitmaps"]:
        each["backup"] = _about(each["name"])
    if arguments.json:
        dump(command, answer)
    else:
        print_table(
            ("NAME", "DIRTY", "GRANULARITY", "SINCE", "STATE", "BACKUP"),
            (
                (each["name"], human(each["count"]), human(each["granularity"]),
                 f"{each['began'][:19]}Z" if each["began"] else "-",
                 f"inconsistent: {each['reason']}" if each["inconsistent"] else "recording",
                 _in_words(each["backup"]))
                for each in answer["bitmaps"]
            ),
        )  # fmt: skip
    unusable = any(each["inconsistent"] for each in answer["bitmaps"])
    return ExitCode.BITMAP_UNUSABLE if unusable else ExitCode.OK


def _about(name: str) -> dict[str, Any] | None:
    if not name.startswith("backup-"):
        return None
    from ..backup import known  # noqa: PLC0415 - when there is one

    return known.about(name)


def _in_words(backup: dict[str, Any] | None) -> str:
    """Of which directory a bitmap is, and how old."""
    if backup is None:
        return "-"
    where = backup["directory"] or f"of the directory with id {backup['id']}"
    age = f", {_age(backup['time'])} old" if backup["time"] else ""
    missing = "" if backup["there"] or not backup["directory"] else " (not there now)"
    return f"{where}{missing}{age}"


def _age(time: str) -> str:
    seconds = int((datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{max(0, seconds)} s"


# diff


def diff(arguments: argparse.Namespace) -> int:
    """snapfs diff MOUNTPOINT A [B], and snapfs diff MOUNTPOINT [B] --since MOMENT."""
    form = arguments.format or ("json" if arguments.json else "table")
    if arguments.json and form != "json":
        raise Misused(f"--json and --format {form} are two formats")
    if arguments.totals and form not in ("json", "table"):
        raise Misused("--totals prints no extents, in no format")
    mount, names = split_names(arguments.words)
    extents: Iterable[dict[str, Any]]
    if arguments.since is not None:
        only(names, 0, 1, "one snapshot at most, as --since is in place of A")
        extents = _since(mount.mountpoint, names[0] if names else None, arguments.since)
    else:
        only(names, 1, 2, "one or two snapshots")
        with Client(mount) as client:
            request = dict(zip(("a", "b"), names, strict=False))
            extents = list(_differences(client, request))
    if arguments.totals:
        totals = dict.fromkeys(("extents", "changed", "unknown"), 0)
        for extent in extents:
            totals["extents"] += 1
            totals[extent["state"]] += extent["length"]
        _print_totals("diff", totals, form == "json")
    elif form == "json":
        dump("diff", {"extents": list(extents)})
    elif form == "table":
        print_table(
            ("START", "LENGTH", "STATE"),
            ((each["start"], each["length"], each["state"]) for each in extents),
        )
    else:
        _print_ranges(extents, form)
    return ExitCode.OK


def _since(mountpoint: str, snapshot: str | None, since: str) -> Iterator[dict[str, Any]]:
    from ..backup.moments import changes  # noqa: PLC0415

    found = changes(mountpoint, snapshot, since)
    both = heapq.merge(
        ((start, stop, "changed") for start, stop in found.changed),
        ((start, stop, "unknown") for start, stop in found.unknown),
    )
    for start, stop, state in both:
        yield {"start": start, "length": stop - start, "state": state}


def _differences(client: Client, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    offset: int | None = 0
    while offset is not None:
        answer = client.call("diff", offset=offset, **request)
        yield from answer["extents"]
        offset = answer["next"]


def _print_ranges(extents: Iterable[dict[str, Any]], form: str) -> None:
    """All that may differ, neighbours merged: for programs that copy it."""
    ranges: list[tuple[int, int]] = []
    for each in extents:
        start, stop = each["start"], each["start"] + each["length"]
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, stop))
    if form == "extents":
        for start, stop in ranges:
            print(start, stop - start)
        return
    # https://www.gnu.org/software/ddrescue/manual/ddrescue_manual.html#Mapfile-structure:
    # a domain is what is finished (+); the map must begin at 0 and have no gaps.
    print("# Mapfile of what differs, by snapfs diff", "0x0 ? 1", sep="\n")
    position = 0
    for start, stop in ranges:
        if position < start:
            print(f"{position:#x} {start - position:#x} ?")
        print(f"{start:#x} {stop - start:#x} +")
        position = stop


def _print_totals(command: str, totals: dict[str, int], as_json: bool) -> None:
    if as_json:
        dump(command, {"totals": totals})
    else:
        print_pairs(totals)


# map

Row = tuple[int, int, bool, bool, str, bool]  # start, length, data, accessible, source, dirty

_TRUTH = ("false", "true")


def _rows(path: str, bitmap_name: str | None) -> Iterator[Row]:
    """The extents of a file, page by page."""
    found, inside = mountinfo.split(path)
    offset: int | None = 0
    with Client(found.mountpoint) as client:
        while offset is not None:
            answer = client.call("map", file=inside, offset=offset, bitmap=bitmap_name, rows=True)
            yield from answer["extents"]
            offset = answer["next"]


def _begun(rows: Iterator[Row]) -> Iterator[Row]:
    """The same rows; an error that comes before the first comes now, before a table's head."""
    return itertools.chain(list(itertools.islice(rows, 1)), rows)


def map_file(arguments: argparse.Namespace) -> int:
    """snapfs map FILE."""
    if arguments.svg is not None:
        return _draw(arguments)
    rows = _begun(_rows(file_of(arguments.words), arguments.bitmap))
    if arguments.totals:
        keys = ("extents", "length", "data", "zero", "inaccessible", "temp", "dirty")
        totals = dict.fromkeys(keys, 0)
        for row in rows:
            totals["extents"] += 1
            totals["length"] += row[1]
            totals[_kind(row)] += row[1]
            totals["temp"] += row[1] * (row[4] == "temp")
            totals["dirty"] += row[1] * row[5]
        _print_totals("map", totals, arguments.json)
    elif arguments.json:
        _print_json(rows, sys.stdout)
    else:
        _print_rows(rows, sys.stdout)
    return ExitCode.OK


def _draw(arguments: argparse.Namespace) -> int:
    """snapfs map FILE --svg PICTURE: of the whole image; - is the standard output."""
    from ..client import newfiles  # noqa: PLC0415 - few draw
    from ..client.older import complete_status  # noqa: PLC0415
    from . import picture, report  # noqa: PLC0415

    if arguments.bitmap is not None or arguments.totals or arguments.json:
        raise UsageError("--svg draws the whole image: it goes with no other option")
    file = file_of(arguments.words)
    found, inside = mountinfo.split(file)
    if inside not in ("", "active"):
        raise UsageError(
            f"--svg draws the image with all of its snapshots; say {found.mountpoint} instead of "
            f"{file}"
        )
    with Client(found) as client:
        status, regions = complete_status(client.call("status")), client.call("regions")
    text = picture.svg(status, regions, report.current().isoformat())
    if arguments.svg == "-":
        sys.stdout.write(text)
    else:
        newfiles.replace(arguments.svg, text.encode())
    return ExitCode.OK


def _print_json(rows: Iterable[Row], out: TextIO) -> None:
    """The bare array of `qemu-img map`, an object a line."""
    separator = "["
    for start, length, data, accessible, source, dirty in rows:
        out.write(
            f'{separator}{{"start": {start}, "length": {length}, "depth": 0, '
            f'"present": {_TRUTH[accessible]}, "zero": {_TRUTH[not data]}, '
            f'"data": {_TRUTH[data]}, "offset": {start}, "accessible": {_TRUTH[accessible]}, '
            f'"dirty": {_TRUTH[dirty]}, "source": "{source}"}}'
        )
        separator = ",\n"
    print("]" if separator != "[" else "[]", file=out)


def _print_rows(rows: Iterable[Row], out: TextIO) -> None:
    """A table of millions of lines: as it comes, with columns wide enough for most."""
    line = "{:>16}  {:>16}  {:12}  {:6}  {}\n"
    out.write(line.format("START", "LENGTH", "KIND", "SOURCE", "DIRTY"))
    for row in rows:
        out.write(line.format(row[0], row[1], _kind(row), row[4], ("no", "yes")[row[5]]))


def _kind(row: Row) -> str:
    if not row[3]:
        return "inaccessible"
    return "data" if row[2] else "zero"
