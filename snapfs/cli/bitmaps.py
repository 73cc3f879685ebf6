"""Commands about dirty bitmaps and extents: bitmap, diff, map, and what create takes of them."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from ..client import mountinfo
from ..client.wire import Client
from ..errors import ExitCode, UsageError
from .output import dump, human, print_pairs, print_table

STAGE = 1000  # extents in one request: a line of it stays far below wire.MAX_LINE


def bitmap(arguments: argparse.Namespace) -> int:
    """snapfs bitmap ACTION MOUNTPOINT ...: 6 if one that is listed is inconsistent."""
    request = {word: getattr(arguments, word) for word in arguments.words}
    with Client(arguments.mountpoint) as client:
        answer = client.call(f"bitmap_{arguments.action}", **request)
    command = f"bitmap {arguments.action}"
    if arguments.action != "list":
        if arguments.json:
            dump(command, {"bitmap": answer})
        return ExitCode.OK
    if arguments.json:
        dump(command, answer)
    else:
        print_table(
            ("NAME", "DIRTY", "GRANULARITY", "STATE"),
            (
                (each["name"], human(each["count"]), human(each["granularity"]),
                 f"inconsistent: {each['reason']}" if each["inconsistent"] else "recording")
                for each in answer["bitmaps"]
            ),
        )  # fmt: skip
    unusable = any(each["inconsistent"] for each in answer["bitmaps"])
    return ExitCode.BITMAP_UNUSABLE if unusable else ExitCode.OK


# What create takes


def selection(client: Client, arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the request for a snapshot; extents are sent ahead."""
    if arguments.clear_bitmap and arguments.bitmap is None:
        raise UsageError("--clear-bitmap needs --bitmap")
    request: dict[str, Any] = {"clear_bitmap": arguments.clear_bitmap}
    if arguments.bitmap is not None:
        request["bitmap"] = arguments.bitmap
    if arguments.next is not None:
        request["next"] = arguments.next
    if arguments.extents is not None:
        request.update(_stage(client, arguments.extents))
    return request


def _stage(client: Client, path: str) -> dict[str, Any]:
    if path == "-":
        return _send(client, read_extents(sys.stdin, "stdin"))
    with open(path, encoding="ascii", errors="replace") as file:
        return _send(client, read_extents(file, path))


def _send(client: Client, extents: Iterator[tuple[int, int]]) -> dict[str, Any]:
    first = list(itertools.islice(extents, STAGE))
    token: dict[str, Any] = client.call("stage", extents=first)
    while more := list(itertools.islice(extents, STAGE)):
        client.call("stage", extents=more, **token)
    return token


def read_extents(lines: Iterable[str], where: str) -> Iterator[tuple[int, int]]:
    """(offset, length) of each line "offset length"; raises UsageError that names the line."""
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or not all(word.isascii() and word.isdigit() for word in words):
            raise UsageError(f'{where}, line {number}: not "offset length", in bytes')
        yield int(words[0]), int(words[1])


# diff


def diff(arguments: argparse.Namespace) -> int:
    """snapfs diff MOUNTPOINT A [B]."""
    with Client(arguments.mountpoint) as client:
        extents = _differences(client, {"a": arguments.a, "b": arguments.b})
        if arguments.totals:
            totals = dict.fromkeys(("extents", "changed", "unknown"), 0)
            for extent in extents:
                totals["extents"] += 1
                totals[extent["state"]] += extent["length"]
            _print_totals("diff", totals, arguments.json)
        elif arguments.json:
            dump("diff", {"extents": list(extents)})
        else:
            print_table(
                ("START", "LENGTH", "STATE"),
                ((each["start"], each["length"], each["state"]) for each in extents),
            )
    return ExitCode.OK


def _differences(client: Client, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    offset: int | None = 0
    while offset is not None:
        answer = client.call("diff", offset=offset, **request)
        yield from answer["extents"]
        offset = answer["next"]


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
    rows = _begun(_rows(arguments.file, arguments.bitmap))
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
