"""How a mount is, or all of them: status."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ..errors import ExitCode
from .arguments import Verbs, add_json
from .listing import ask, end
from .output import complain, dump
from .terminal import Painter, columns, printable, wants_colour

OF_SNAPSHOTS = {"lost", "incomplete"}  # kinds of problems
OF_BITMAPS = {"bitmaps"}


def add_to(verbs: Verbs) -> None:
    """Add our command."""
    verb = verbs.add_parser("status", help="show what is wrong with a mount, and how it is")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?", help="default: all")
    verb.add_argument(  # as lines, when it is JSON
        "--watch", action="store_const", dest="form", const="lines", default="document",
        help="go on showing it, with a heat map",
    )  # fmt: skip
    add_colour(verb)
    add_json(verb)
    verb.set_defaults(run=status)


def add_colour(verb: argparse.ArgumentParser) -> None:
    """Add --color."""
    verb.add_argument("--color", choices=("auto", "always", "never"), default="auto")


def exit_status(answer: Mapping[str, Any]) -> int:
    """What the problems of a mount make of the exit status."""
    kinds = {each["kind"] for each in answer["problems"] if each["severity"] == "error"}
    if kinds - OF_SNAPSHOTS - OF_BITMAPS:
        return ExitCode.ERROR
    if kinds & OF_SNAPSHOTS:
        return ExitCode.SNAPSHOT_UNUSABLE
    return ExitCode.BITMAP_UNUSABLE if kinds else ExitCode.OK


def status(arguments: argparse.Namespace) -> int:
    """snapfs status [MOUNTPOINT]: 1 if it is not healthy, 4 or 6 if no more than snapshots,
    or bitmaps, are concerned."""
    if arguments.form == "lines":
        from . import watch  # noqa: PLC0415 - rich takes long to import

        return watch.watch(arguments)
    if arguments.mountpoint is None:
        return _all(arguments)
    from ..client.older import complete_status  # noqa: PLC0415
    from ..client.wire import Client  # noqa: PLC0415

    with Client(arguments.mountpoint) as client:
        answer = complete_status(client.call("status"))
        if arguments.json:
            dump("status", answer)
        else:
            _print(answer, _users(client.mount, answer), arguments.color)
    return exit_status(answer)


def _users(mount: Any, answer: Mapping[str, Any]) -> list[str]:
    """Who uses a mount, if anybody does: it takes a look at all processes."""
    if not any(answer["open"].values()):
        return []
    from ..client import holders  # noqa: PLC0415

    try:
        return holders.users(mount)
    except OSError:
        return []


def _print(answer: Mapping[str, Any], users: list[str], colour: str) -> None:
    from . import report  # noqa: PLC0415

    painter = Painter(wants_colour(colour))
    for line in report.report(answer, painter, columns(), report.current(), users):
        print(line)


def _all(arguments: argparse.Namespace) -> int:
    worst = [int(ExitCode.OK)]
    documents: list[Mapping[str, Any]] = []
    for mount, answer, error in ask("status", worst):
        if answer is not None:
            worst[0] = worst[0] or exit_status(answer)
        if not arguments.json:
            print("\n" * bool(documents), end="")
            if answer is None:
                complain(f"{printable(mount.mountpoint)}: {error}", worst[0])
            else:
                _print(answer, [], arguments.color)
        document = {"mount": {"mountpoint": mount.mountpoint}, "error": error}
        documents.append(document if answer is None else answer)
    end("status", documents, arguments.json)
    return worst[0]
