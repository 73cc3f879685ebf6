"""What each command does: ask the daemon, print the answer."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from ..client import mountinfo
from ..client.wire import Client, RemoteError
from ..errors import ExitCode
from ..storage.linux import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, fallocate
from . import bitmaps
from .helpers import complain
from .output import dump, human, print_pairs, print_table

EVENT_SECONDS = 20  # of waiting in one request


def mount(arguments: argparse.Namespace) -> int:
    """snapfs mount IMAGE MOUNTPOINT."""
    from . import mounting  # noqa: PLC0415 - it starts a daemon, which the others do not need

    if arguments.foreground or arguments.ready_fd is not None:
        return mounting.mount_in_foreground(
            arguments.image, arguments.mountpoint, arguments.o, arguments.ready_fd
        )
    return mounting.mount_in_background(arguments.image, arguments.mountpoint, arguments.o)


def umount(arguments: argparse.Namespace) -> int:
    """snapfs umount MOUNTPOINT."""
    from . import mounting  # noqa: PLC0415

    return mounting.unmount(arguments.mountpoint)


def create(arguments: argparse.Namespace) -> int:
    """snapfs create MOUNTPOINT [NAME] [--bitmap B | --extents FILE]."""
    name = arguments.name
    if name is None:
        name = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    with Client(arguments.mountpoint) as client:
        snapshot = client.call("create", name=name, **bitmaps.selection(client, arguments))
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


def trim(arguments: argparse.Namespace) -> int:
    """snapfs trim FILE: punches what the daemon says there is to punch in the range."""
    found, inside = mountinfo.split(arguments.file)
    trimmed = 0
    with Client(found.mountpoint) as client:
        if inside == "active":
            _write_back(arguments.file)
        for runs in _runs(client, inside, arguments):
            if runs and not arguments.dry_run:
                _punch(arguments.file, runs)
            trimmed += sum(count for _, count in runs)
    if arguments.json:
        dump("trim", {"trimmed": trimmed, "dry_run": arguments.dry_run})
    elif arguments.verbose or arguments.dry_run:
        would = " (dry run)" if arguments.dry_run else ""
        print(f"{arguments.file}: {human(trimmed)} ({trimmed} bytes) trimmed{would}")
    return ExitCode.OK


def _write_back(path: str) -> None:
    """Have in the image what is only in the page cache, so that it counts as data."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _runs(
    client: Client, inside: str, arguments: argparse.Namespace
) -> Iterator[list[tuple[int, int]]]:
    """What there is to punch, as (start, length), page by page."""
    request = {"offset": arguments.offset, "length": arguments.length}
    request = {key: value for key, value in request.items() if value is not None}
    end = None if arguments.length is None else (arguments.offset or 0) + arguments.length
    while True:
        answer = client.call("runs", file=inside, minimum=arguments.minimum, **request)
        yield answer["runs"]
        if answer["next"] is None:
            return
        request["offset"] = answer["next"]
        if end is not None:
            request["length"] = end - answer["next"]


def _punch(path: str, runs: list[tuple[int, int]]) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        for start, count in runs:
            fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, count)
    finally:
        os.close(fd)


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
