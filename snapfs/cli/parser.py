"""The command line's grammar: the families of commands put together."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from .. import __version__
from . import backups, bitmaps, checking, mounting, points, snapshots, trimming

FAMILIES = (mounting, snapshots, trimming, bitmaps, checking, backups, points)


def build_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of all commands, each of which sets `run`, and each by its name."""
    parser = argparse.ArgumentParser(
        prog="snapfs",
        description="Serve a live disk image and its point-in-time snapshots as files.",
        epilog="mount -t fuse.snapfs IMAGE MOUNTPOINT works as well.  See snapfs(1).",
    )
    parser.add_argument("--version", action="version", version=f"snapfs {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")
    for family in FAMILIES:
        family.add_to(verbs)
    return parser, verbs.choices
