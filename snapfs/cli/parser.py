"""The command line's grammar."""

from __future__ import annotations

import argparse

from .. import __version__
from ..errors import UsageError
from ..options import parse_size
from . import backups, commands

VERBS = (
    "mount",
    "umount",
    "create",
    "delete",
    "list",
    "show",
    "status",
    "trim",
    "map",
    "limit",
    "copy",
    "backup",
    "restore",
    "verify",
    "prune",
)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
    _add_json(verb)
    verb.set_defaults(run=commands.create)

    verb = verbs.add_parser("delete", help="delete snapshots")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("names", metavar="NAME", nargs="+")
    verb.add_argument("--dry-run", action="store_true", help="say what would be deleted")
    _add_json(verb)
    verb.set_defaults(run=commands.delete)

    verb = verbs.add_parser("list", help="list snapshots")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    _add_json(verb)
    verb.set_defaults(run=commands.list_snapshots)

    verb = verbs.add_parser("show", help="show one snapshot")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("name", metavar="NAME")
    _add_json(verb)
    verb.set_defaults(run=commands.show)

    verb = verbs.add_parser("status", help="show the state of a mount")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    _add_json(verb)
    verb.set_defaults(run=commands.status)

    verb = verbs.add_parser("trim", help="discard a range of a snapshot, as fstrim does")
    verb.add_argument("file", metavar="FILE")
    verb.add_argument("-o", "--offset", type=_size, default=0, metavar="BYTES")
    verb.add_argument("-l", "--length", type=_size, metavar="BYTES")
    verb.add_argument("-m", "--minimum", type=_size, default=0, metavar="BYTES")
    verb.add_argument("-v", "--verbose", action="store_true", help="print what was discarded")
    _add_json(verb)
    verb.set_defaults(run=commands.trim)

    verb = verbs.add_parser("map", help="list the extents of active or of a snapshot")
    verb.add_argument("file", metavar="FILE")
    verb.add_argument("--totals", action="store_true", help="sums instead of extents")
    _add_json(verb)
    verb.set_defaults(run=commands.map_file)

    verb = verbs.add_parser("limit", help="bound the space of the temp images")
    verb.add_argument("mountpoint", metavar="MOUNTPOINT")
    verb.add_argument("size", type=_limit, metavar="SIZE", help="or none")
    _add_json(verb)
    verb.set_defaults(run=commands.limit)

    _add_copies(verbs)
    return parser


def _add_copies(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    verb = verbs.add_parser("copy", help="copy what may be read of a snapshot")
    verb.add_argument("snapshot", metavar="SNAPSHOT", help="MOUNTPOINT/snapshots/NAME")
    verb.add_argument("dest", metavar="DEST", help="a file, or a block device")
    verb.add_argument("--format", choices=("raw", "qcow2"), default="raw", help="of DEST")
    verb.add_argument("--backing", metavar="PREVIOUS", help="the image below a qcow2 DEST")
    verb.add_argument("--discard", action="store_true", help="give up what is safe at DEST")
    verb.add_argument("--force", action="store_true", help="overwrite; do not check for room")
    verb.add_argument(
        "--allow-missing", action="store_true", help="a new DEST need not be the whole image"
    )
    _add_rate(verb)
    verb.set_defaults(run=backups.copy)

    verb = verbs.add_parser("backup", help="add a point to a backup directory")
    verb.add_argument("where", metavar="MOUNTPOINT", help="or, with --init, DIR")
    verb.add_argument("directory", metavar="DIR", nargs="?")
    verb.add_argument("--init", action="store_true", help="make DIR a backup directory")
    verb.add_argument("--full", action="store_true", help="copy everything")
    verb.add_argument("--force", action="store_true", help="do not check for room")
    _add_rate(verb)
    verb.set_defaults(run=backups.backup)

    verb = verbs.add_parser("restore", help="rebuild a point of a backup")
    verb.add_argument("directory", metavar="DIR")
    verb.add_argument("dest", metavar="DEST", help="a new file; a block device takes --force")
    verb.add_argument("--at", metavar="POINT", help="number, name or time; default: the newest")
    verb.add_argument("--force", action="store_true", help="overwrite; do not check for room")
    _add_progress(verb)
    verb.set_defaults(run=backups.restore)

    verb = verbs.add_parser("verify", help="prove the checksums of a backup")
    verb.add_argument("directory", metavar="DIR")
    verb.add_argument("--at", metavar="POINT", help="only what this point takes")
    _add_progress(verb)
    verb.set_defaults(run=backups.verify)

    verb = verbs.add_parser("prune", help="fold old points of a backup into the next ones")
    verb.add_argument("directory", metavar="DIR")
    verb.add_argument("--keep-last", type=_count, default=0, metavar="N", help="the newest")
    verb.add_argument("--keep-daily", type=_count, default=0, metavar="N", help="one a day")
    verb.add_argument("--keep-weekly", type=_count, default=0, metavar="N", help="one a week")
    verb.add_argument("--dry-run", action="store_true", help="say what would be dropped")
    _add_json(verb)
    verb.set_defaults(run=backups.prune)


def _add_rate(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--bwlimit", type=_rate, metavar="BYTES", help="bytes a second at most")
    _add_progress(verb)


def _add_progress(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--progress", type=int, metavar="FD", help="write lines N/100 there")
    _add_json(verb)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return int(text)


def _rate(text: str) -> int:
    size = _size(text)
    if not size:
        raise argparse.ArgumentTypeError("a rate of 0 never ends; leave the option out")
    return size


def _limit(text: str) -> int | None:
    return None if text == "none" else _size(text)


def _add_json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print JSON")
