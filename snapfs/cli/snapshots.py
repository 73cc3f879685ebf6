"""Snapshots and the mount they are of: create, list, show, limit, events."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..client.documents import document
from ..client.naming import split_names
from ..client.older import complete_list
from ..client.wire import Client
from ..errors import ExitCode
from .arguments import Verbs, add_json, add_words, only, size_or_none
from .listing import HEADS, list_all, list_row
from .output import dump, print_pairs, print_table
from .selection import add_selection, selection

EVENT_SECONDS = 20  # of waiting in one request


def add_to(verbs: Verbs) -> None:
    """Add our commands."""
    verb = verbs.add_parser("create", help="take a snapshot")
    add_words(verb, "MOUNTPOINT [NAME]", "or one path; default of NAME: the time in UTC")
    add_selection(verb)
    verb.add_argument("--note", metavar="TEXT", help="what list says of it")
    verb.add_argument("--pin", action="store_true", help="keep it until it is unpinned")
    add_json(verb)
    verb.set_defaults(run=create)

    verb = verbs.add_parser("list", help="list snapshots")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?", help="default: all")
    add_json(verb)
    verb.set_defaults(run=list_snapshots)

    verb = verbs.add_parser("show", help="show one snapshot")
    add_words(verb, "MOUNTPOINT NAME", "or the path MOUNTPOINT/snapshots/NAME")
    add_json(verb)
    verb.set_defaults(run=show)

    verb = verbs.add_parser("limit", help="bound the space of the temp images")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("size", type=size_or_none, metavar="SIZE", help="or none")
    add_json(verb)
    verb.set_defaults(run=limit)

    verb = verbs.add_parser("events", help="wait for what happens to the snapshots and print it")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("--once", action="store_true", help="print what there is, do not wait")
    add_json(verb)
    verb.set_defaults(run=events, form="lines")


def create(arguments: argparse.Namespace) -> int:
    """snapfs create MOUNTPOINT [NAME] [--bitmap B | --extents FILE]."""
    mount, names = split_names(arguments.words)
    only(names, 0, 1, "one name at most")
    named = {"name": names[0]} if names else {"unnamed": True}
    with Client(mount) as client:
        snapshot = client.call(
            "create",
            **named,
            **selection(client, arguments),
            note=arguments.note,
            pinned=arguments.pin,
        )
    if arguments.json:
        dump("create", {"snapshot": snapshot})
    else:
        print(snapshot["name"])
    return ExitCode.OK


def list_snapshots(arguments: argparse.Namespace) -> int:
    """snapfs list [MOUNTPOINT]."""
    if arguments.mountpoint is None:
        return list_all(arguments)
    with Client(arguments.mountpoint) as client:
        answer = complete_list(client.call("list"))
    if arguments.json:
        dump("list", answer)
    else:
        print_table(HEADS, map(list_row, answer["snapshots"]))
    return _state_status(answer["snapshots"])


def _state_status(snapshots: list[dict[str, Any]]) -> int:
    whole = all(each["state"] == "ok" for each in snapshots)
    return ExitCode.OK if whole else ExitCode.SNAPSHOT_UNUSABLE


def show(arguments: argparse.Namespace) -> int:
    """snapfs show MOUNTPOINT NAME."""
    mount, names = split_names(arguments.words)
    with Client(mount) as client:
        answer = client.call("show", name=only(names, 1, 1, "one name")[0])
    if arguments.json:
        dump("show", answer)
    else:
        print_pairs(answer["snapshot"])
    return _state_status([answer["snapshot"]])


def events(arguments: argparse.Namespace) -> int:
    """snapfs events MOUNTPOINT: one line each, until interrupted or unmounted."""
    newest = 0
    with Client(arguments.mountpoint) as client:
        while True:
            seconds = 0 if arguments.once else EVENT_SECONDS
            for event in client.call("events", after=newest, seconds=seconds)["events"]:
                newest = event["number"]
                if arguments.json:
                    line = document("events", {"message_type": "event", **event})
                    print(json.dumps(line), flush=True)
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
