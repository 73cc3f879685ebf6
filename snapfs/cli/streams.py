"""Snapshots on their way to another machine: send, receive.

The programs of snapfs.backup are imported when they are used.
"""

from __future__ import annotations

import argparse
import sys

from ..errors import ExitCode
from .arguments import Verbs, add_words, descriptor, file_of, rate
from .guarding import Misused
from .jobs import Result, add_progress, add_quiet, long_job
from .output import dump, human


def add_to(verbs: Verbs) -> None:
    """Add our commands."""
    verb = verbs.add_parser("send", help="write a snapshot, or what changed up to it, to a pipe")
    add_words(verb, "SNAPSHOT", "a path, or MOUNTPOINT NAME")
    verb.add_argument(
        "--since", metavar="MOMENT", help="only what changed: a snapshot, a bitmap or DIR/POINT"
    )
    verb.add_argument(
        "--resume-from", metavar="STATE", help="what snapfs receive --state IMAGE has printed"
    )
    verb.add_argument("--bwlimit", type=rate, metavar="BYTES", help="bytes a second at most")
    verb.add_argument("--progress", type=descriptor, metavar="FD", help="write lines N/100 there")
    add_quiet(verb)
    verb.set_defaults(run=send, json=False, form=None)

    verb = verbs.add_parser("receive", help="apply what snapfs send writes to an image")
    verb.add_argument("image", metavar="IMAGE", help="a raw image, or a block device")
    verb.add_argument("--state", action="store_true", help="say what IMAGE holds, for send")
    verb.add_argument("--force", action="store_true", help="overwrite; do not check for room")
    add_progress(verb)
    verb.set_defaults(run=receive)


def send(arguments: argparse.Namespace) -> int:
    """snapfs send SNAPSHOT."""
    from ..backup import sending  # noqa: PLC0415

    options = sending.SendOptions(
        since=arguments.since,
        resume=arguments.resume_from,
        bytes_per_second=arguments.bwlimit,
        progress_fd=arguments.progress,
        quiet=arguments.quiet,
    )

    def describe(result: Result) -> str:
        since = f" since {result['since']}" if result["since"] else ""
        return (
            f"{result['snapshot']}{since}: {human(result['sent_bytes'])} sent, "
            f"{human(result['zero_bytes'])} of zeros{_resumed(result)}"
        )

    long_job(
        arguments,
        lambda: sending.send(file_of(arguments.words), sys.stdout.fileno(), options),
        describe,
        interrupted="interrupted; what has arrived is said by snapfs receive --state IMAGE",
        out=sys.stderr,
    )
    return ExitCode.OK


def _resumed(result: Result) -> str:
    return f", resumed at {result['resumed_at']}" if result["resumed_at"] else ""


def receive(arguments: argparse.Namespace) -> int:
    """snapfs receive IMAGE, and snapfs receive --state IMAGE."""
    from ..backup import receiving  # noqa: PLC0415

    if arguments.state:
        if arguments.force:
            raise Misused("--state changes nothing, so there is nothing to force")
        found = receiving.state(arguments.image)
        if arguments.json:
            dump("receive", found)
        else:
            print(found["state"])
        return ExitCode.OK
    options = receiving.ReceiveOptions(
        force=arguments.force,
        progress_fd=arguments.progress,
        json=arguments.json,
        quiet=arguments.quiet,
    )

    def describe(result: Result) -> str:
        if result["already_there"]:
            return f"{result['image']}: is at {result['snapshot']} already"
        return (
            f"{result['image']}: is at {result['snapshot']}, "
            f"{human(result['received_bytes'])} received, "
            f"{human(result['zero_bytes'])} of zeros{_resumed(result)}"
        )

    long_job(
        arguments,
        lambda: receiving.receive(arguments.image, sys.stdin.buffer, options),
        describe,
        interrupted=f"interrupted; snapfs receive --state {arguments.image} says what has arrived",
    )
    return ExitCode.OK
