"""The grammar of copies and backups; a part of parser.py."""

from __future__ import annotations

import argparse

from . import backups
from .arguments import add_json, count, descriptor, rate

VERBS = ("copy", "backup", "restore", "verify", "prune")


def add_to(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add our commands; each sets `run`."""
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
    verb.add_argument("--keep-last", type=count, default=0, metavar="N", help="the newest")
    verb.add_argument("--keep-daily", type=count, default=0, metavar="N", help="one a day")
    verb.add_argument("--keep-weekly", type=count, default=0, metavar="N", help="one a week")
    verb.add_argument("--dry-run", action="store_true", help="say what would be dropped")
    add_json(verb)
    verb.set_defaults(run=backups.prune)


def _add_rate(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--bwlimit", type=rate, metavar="BYTES", help="bytes a second at most")
    _add_progress(verb)


def _add_progress(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--progress", type=descriptor, metavar="FD", help="write lines N/100 there")
    add_json(verb)
