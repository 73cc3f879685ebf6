"""The command line's grammar."""

from __future__ import annotations

import argparse

from .. import __version__
from . import backupparser, bitmaps, checking, commands
from .arguments import add_json, limit, size

VERBS = (
    "mount", "umount", "create", "delete", "list", "show", "status", "trim", "map", "diff",
    "bitmap", "limit", "events", "check", *backupparser.VERBS,
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`."""
    parser = argparse.ArgumentParser(
        prog="snapfs",
        description="Serve a live disk image and its point-in-time snapshots as files.",
        epilog="mount -t fuse.snapfs IMAGE MOUNTPOINT works as well.  See snapfs(1).",
    )
    parser.add_argument("--version", action="version", version=f"snapfs {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")

    verb = verbs.add_parser("mount", help="serve an image at a mountpoint")
    verb.add_argument("image", metavar="IMAGE")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("-o", action="append", default=[], metavar="OPTION[,OPTION...]")
    verb.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground")
    verb.add_argument("--ready-fd", type=int, metavar="FD", help="write READY there (with -f)")
    verb.set_defaults(run=commands.mount)

    verb = verbs.add_parser("umount", help="unmount; returns when all is flushed")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.set_defaults(run=commands.umount)

    verb = verbs.add_parser("create", help="take a snapshot")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("name", metavar="NAME", nargs="?", help="default: the time in UTC")
    access = verb.add_mutually_exclusive_group()
    access.add_argument("--bitmap", metavar="B", help="give access to its clusters only")
    access.add_argument("--extents", metavar="FILE", help="give access to these only; - is stdin")
    after = verb.add_mutually_exclusive_group()
    after.add_argument("--clear-bitmap", action="store_true", help="empty B in that instant")
    after.add_argument("--next", metavar="B2", help="begin a new bitmap in that instant")
    add_json(verb)
    verb.set_defaults(run=commands.create)

    verb = verbs.add_parser("delete", help="delete snapshots")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("names", metavar="NAME", nargs="+")
    verb.add_argument("--dry-run", action="store_true", help="say what would be deleted")
    add_json(verb)
    verb.set_defaults(run=commands.delete)

    verb = verbs.add_parser("list", help="list snapshots")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    add_json(verb)
    verb.set_defaults(run=commands.list_snapshots)

    verb = verbs.add_parser("show", help="show one snapshot")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("name", metavar="NAME")
    add_json(verb)
    verb.set_defaults(run=commands.show)

    verb = verbs.add_parser("status", help="show the state of a mount")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    add_json(verb)
    verb.set_defaults(run=commands.status)

    verb = verbs.add_parser("trim", help="discard a range, as fstrim does")
    verb.add_argument("file", metavar="FILE", help="a snapshot; active takes both -o and -l")
    verb.add_argument("-n", "--dry-run", action="store_true", help="say what would be discarded")
    verb.add_argument("-o", "--offset", type=size, metavar="BYTES")
    verb.add_argument("-l", "--length", type=size, metavar="BYTES")
    verb.add_argument("-m", "--minimum", type=size, default=0, metavar="BYTES")
    verb.add_argument("-v", "--verbose", action="store_true", help="print what was discarded")
    add_json(verb)
    verb.set_defaults(run=commands.trim)

    verb = verbs.add_parser("map", help="list the extents of active or of a snapshot")
    verb.add_argument("file", metavar="FILE")
    verb.add_argument("--bitmap", metavar="B", help="dirty is what this one says, not any")
    verb.add_argument("--totals", action="store_true", help="sums instead of extents")
    add_json(verb)
    verb.set_defaults(run=bitmaps.map_file)

    verb = verbs.add_parser("diff", help="list what differs between snapshots, or from now")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("a", metavar="A")
    verb.add_argument("b", metavar="B", nargs="?", help="default: the image now")
    verb.add_argument("--totals", action="store_true", help="sums instead of extents")
    add_json(verb)
    verb.set_defaults(run=bitmaps.diff)

    _add_bitmap(verbs.add_parser("bitmap", help="track what changes, in dirty bitmaps"))

    verb = verbs.add_parser("limit", help="bound the space of the temp images")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("size", type=limit, metavar="SIZE", help="or none")
    add_json(verb)
    verb.set_defaults(run=commands.limit)

    verb = verbs.add_parser("events", help="wait for what happens to the snapshots and print it")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("--once", action="store_true", help="print what there is, do not wait")
    add_json(verb)
    verb.set_defaults(run=commands.events)

    verb = verbs.add_parser("check", help="look a state directory over, not mounted")
    verb.add_argument("state", metavar="STATE", help="the state directory, or its image")
    verb.add_argument("--repair", action="store_true", help="put right what needs no guess")
    add_json(verb)
    verb.set_defaults(run=checking.check)

    backupparser.add_to(verbs)
    return parser


def _add_bitmap(verb: argparse.ArgumentParser) -> None:
    actions = verb.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, words, text in (
        ("add", ("NAME",), "make a bitmap, which records from now on"),
        ("list", (), "list the bitmaps"),
        ("clear", ("NAME",), "empty a bitmap, or begin an inconsistent one again"),
        ("merge", ("SOURCE", "TARGET"), "add the clusters of one to another"),
        ("remove", ("NAME",), "remove a bitmap"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("mountpoint", metavar="MOUNTPOINT")
        for word in words:
            action.add_argument(word.lower(), metavar=word)
        add_json(action)
        action.set_defaults(run=bitmaps.bitmap, action=name, words=[word.lower() for word in words])
