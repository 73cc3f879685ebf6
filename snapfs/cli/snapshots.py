"""Snapshots and the mount they are of: create, delete, list, show, status, limit, events."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..client.wire import Client, RemoteError
from ..errors import ExitCode
from .arguments import Verbs, add_json, size_or_none
from .output import complain, dump, human, print_pairs, print_table
from .selection import add_selection, selection

EVENT_SECONDS = 20  # of waiting in one request


def add_to(verbs: Verbs) -> None:
    """Add our commands."""
    verb = verbs.add_parser("create", help="take a snapshot")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("name", metavar="NAME", nargs="?", help="default: the time in UTC")
    add_selection(verb)
    add_json(verb)
    verb.set_defaults(run=create)

    verb = verbs.add_parser("delete", help="delete snapshots")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("names", metavar="NAME", nargs="+")
    verb.add_argument("--dry-run", action="store_true", help="say what would be deleted")
    add_json(verb)
    verb.set_defaults(run=delete)

    verb = verbs.add_parser("list", help="list snapshots")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    add_json(verb)
    verb.set_defaults(run=list_snapshots)

    verb = verbs.add_parser("show", help="show one snapshot")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("name", metavar="NAME")
    add_json(verb)
    verb.set_defaults(run=show)

    verb = verbs.add_parser("status", help="show the state of a mount")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    add_json(verb)
    verb.set_defaults(run=status)

    verb = verbs.add_parser("limit", help="bound the space of the temp images")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("size", type=size_or_none, metavar="SIZE", help="or none")
    add_json(verb)
    verb.set_defaults(run=limit)

    verb = verbs.add_parser("events", help="wait for what happens to the snapshots and print it")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("--once", action="store_true", help="print what there is, do not wait")
    add_json(verb)
    verb.set_defaults(run=events)


def create(arguments: argparse.Namespace) -> int:
    """snapfs create MOUNTPOINT [NAME] [--bitmap B | --extents FILE]."""
    named = {"unnamed": True} if arguments.name is None else {"name": arguments.name}
    with Client(arguments.mountpoint) as client:
        snapshot = client.call("create", **named, **selection(client, arguments))
    if arguments.json:
        dump("create", {"snapshot": snapshot})
    else:
        print(snapshot["name"])
    return ExitCode.OK


def delete(arguments: argparse.Namespace) -> int:
    """snapfs delete MOUNTPOINT NAME...: all that can be deleted, whatever happens to others."""
    deleted: list[dict[str, Any]] = []
    worst = int(ExitCode.OK)
    with Client(arguments.mountpoint) as client:
        for name in arguments.names:
            try:
                deleted.append(client.call("delete", name=name, dry_run=arguments.dry_run))
            except RemoteError as error:
                worst = complain(str(error), error.exit_status)
    if arguments.json:
        dump("delete", {"deleted": deleted, "dry_run": arguments.dry_run})
    elif arguments.dry_run:
        for snapshot in deleted:
            print(f"would delete {snapshot['name']}, freeing up to {human(snapshot['temp_bytes'])}")
    return worst if not deleted or worst == ExitCode.OK else ExitCode.PARTIAL


def list_snapshots(arguments: argparse.Namespace) -> int:
    """snapfs list MOUNTPOINT."""
    with Client(arguments.mountpoint) as client:
        answer = client.call("list")
    if arguments.json:
        dump("list", answer)
    else:
        print_table(
            ("NAME", "CREATED", "SIZE", "TEMP", "STATE"),
            (
                (each["name"], each["created"][:19] + "Z", human(each["size"]),
                 human(each["temp_bytes"]), each["state"])
                for each in answer["snapshots"]
            ),
        )  # fmt: skip
    return _state_status(answer["snapshots"])


def _state_status(snapshots: list[dict[str, Any]]) -> int:
    whole = all(each["state"] == "ok" for each in snapshots)
    return ExitCode.OK if whole else ExitCode.SNAPSHOT_UNUSABLE


def show(arguments: argparse.Namespace) -> int:
    """snapfs show MOUNTPOINT NAME."""
    with Client(arguments.mountpoint) as client:
        answer = client.call("show", name=arguments.name)
    if arguments.json:
        dump("show", answer)
    else:
        print_pairs(answer["snapshot"])
    return _state_status([answer["snapshot"]])


def status(arguments: argparse.Namespace) -> int:
    """snapfs status MOUNTPOINT."""
    with Client(arguments.mountpoint) as client:
        answer = client.call("status")
    if arguments.json:
        dump("status", answer)
    else:
        _print_status(answer)
    if not answer["mount"]["healthy"]:
        return ExitCode.ERROR
    return _state_status(answer["snapshots"])


def _print_status(answer: dict[str, Any]) -> None:
    names = [
        each["name"] + (" (inconsistent)" if each["inconsistent"] else "")
        for each in answer["bitmaps"]
    ]
    print_pairs(
        {**answer, "snapshots": len(answer["snapshots"]), "bitmaps": ", ".join(names) or None}
    )


def events(arguments: argparse.Namespace) -> int:
    """snapfs events MOUNTPOINT: one line each, until interrupted or unmounted."""
    newest = 0
    with Client(arguments.mountpoint) as client:
        while True:
            seconds = 0 if arguments.once else EVENT_SECONDS
            for event in client.call("events", after=newest, seconds=seconds)["events"]:
                newest = event["number"]
                if arguments.json:
                    print(json.dumps({"message_type": "event", **event}), flush=True)
                else:
                    details = [f"{key}={event[key]}" for key in list(event)[3:]]
                    print(event["time"], event["event"], *details, flush=True)
            if arguments.once:
                return ExitCode.OK


def limit(arguments: argparse.Namespace) -> int:
    """snapfs limit MOUNTPOINT SIZE."""
    request = {} if arguments.size is None else {"bytes": arguments.size}
    with Client(arguments.mountpoint) as client:
        answer = client.call("limit", **request)
    if arguments.json:
        dump("limit", {"temp": answer})
    return ExitCode.OK
