"""Mounting: mount and umount.  What a daemon is made of is imported when one is started."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..errors import ExitCode
from .arguments import Verbs, add_json, add_wait
from .output import dump


def add_to(verbs: Verbs) -> None:
    """Add our commands."""
    verb = verbs.add_parser("mount", help="serve an image at a mountpoint")
    verb.add_argument("image", metavar="IMAGE")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("-o", action="append", default=[], metavar="OPTION[,OPTION...]")
    verb.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground")
    verb.add_argument("--ready-fd", type=int, metavar="FD", help="write READY there (with -f)")
    add_json(verb)
    verb.set_defaults(run=mount)

    verb = verbs.add_parser("umount", help="unmount; returns when all is flushed")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("-l", "--lazy", action="store_true", help="unmount now, wait for nobody")
    verb.add_argument("-f", "--force", action="store_true", help="also if it does not answer")
    add_wait(verb, "for those who use it, and name them; without SECONDS as long as it takes")
    add_json(verb)
    verb.set_defaults(run=umount)


def mount(arguments: argparse.Namespace) -> int:
    """snapfs mount IMAGE MOUNTPOINT."""
    if not arguments.foreground and arguments.ready_fd is None:
        warnings = mount_in_background(arguments.image, arguments.mountpoint, arguments.o)
        if arguments.json:
            values = {"mountpoint": os.path.realpath(arguments.mountpoint), "warnings": warnings}
            dump("mount", {"image": os.path.realpath(arguments.image), **values})
        return ExitCode.OK
    from ..daemon import starting  # noqa: PLC0415
    from ..daemon.options import parse_options  # noqa: PLC0415

    options = parse_options(arguments.o)
    starting.in_foreground(arguments.image, arguments.mountpoint, options, arguments.ready_fd)
    return ExitCode.OK


def mount_in_background(
    image: str,
    mountpoint: str,
    texts: Sequence[str],
    *,
    dry_run: bool = False,
    sloppy: bool = False,
) -> list[str]:
    """Mount, and return its warnings when the mount answers; with `dry_run` only check that it
    could be.

    Raises SnapfsError with the daemon's reason if it could not start.
    """
    from ..daemon.options import parse_options  # noqa: PLC0415

    options = parse_options(texts, sloppy=sloppy)
    if dry_run:
        from ..daemon.preflight import dry_run as check  # noqa: PLC0415

        check(image, mountpoint, options)
        return []
    from ..daemon import starting  # noqa: PLC0415

    warnings = starting.in_background(image, mountpoint, options)
    for warning in warnings:
        print(f"snapfs: warning: {warning}", file=sys.stderr)
    return warnings


def umount(arguments: argparse.Namespace) -> int:
    """snapfs umount MOUNTPOINT."""
    status = unmount(
        arguments.mountpoint,
        lazy=arguments.lazy,
        force=arguments.force,
        patience=arguments.wait,
    )
    if arguments.json:
        dump("umount", {"mountpoint": os.path.abspath(arguments.mountpoint)})
    return status


def unmount(
    mountpoint: str, *, lazy: bool = False, force: bool = False, patience: float = 0.0
) -> int:
    """Unmount, and return when the daemon has flushed and exited, unless it is `lazy`."""
    from ..client import ending  # noqa: PLC0415

    ending.end(mountpoint, lazy=lazy, force=force, patience=patience)
    return ExitCode.OK
