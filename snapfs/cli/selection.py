"""What a new snapshot gives access to: all, the clusters of a bitmap, or extents from a file."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from ..client.wire import Client
from ..errors import UsageError
from .guarding import Misused

STAGE = 1000  # extents in one request: a line of it stays far below wire.MAX_LINE


def add_selection(verb: argparse.ArgumentParser) -> None:
    """Add --bitmap or --extents, and what becomes of the bitmap."""
    access = verb.add_mutually_exclusive_group()
    access.add_argument("--bitmap", metavar="B", help="give access to its clusters only")
    access.add_argument("--extents", metavar="FILE", help="give access to these only; - is stdin")
    after = verb.add_mutually_exclusive_group()
    after.add_argument("--clear-bitmap", action="store_true", help="empty B in that instant")
    after.add_argument("--next", metavar="B2", help="begin a new bitmap in that instant")


def selection(client: Client, arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the request for a snapshot; extents are sent ahead."""
    if arguments.clear_bitmap and arguments.bitmap is None:
        raise Misused("--clear-bitmap needs --bitmap")
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
