"""Trim: discarding a range of a snapshot, or of active, as fstrim(8) does."""

from __future__ import annotations

import argparse

from ..errors import ExitCode
from .arguments import Verbs, add_json, add_words, file_of, size
from .output import dump, human


def add_to(verbs: Verbs) -> None:
    """Add our command."""
    verb = verbs.add_parser("trim", help="discard a range, as fstrim does")
    add_words(verb, "FILE", "a snapshot, or MOUNTPOINT NAME; active takes both -o and -l")
    verb.add_argument("-n", "--dry-run", action="store_true", help="say what would be discarded")
    verb.add_argument("-o", "--offset", type=size, metavar="BYTES")
    verb.add_argument("-l", "--length", type=size, metavar="BYTES")
    verb.add_argument("-m", "--minimum", type=size, default=0, metavar="BYTES")
    verb.add_argument("-v", "--verbose", action="store_true", help="print what was discarded")
    add_json(verb)
    verb.set_defaults(run=trim)


def trim(arguments: argparse.Namespace) -> int:
    """snapfs trim FILE."""
    from ..client import trimming  # noqa: PLC0415 - it imports system calls

    path = file_of(arguments.words)
    trimmed = trimming.trim(
        path,
        offset=arguments.offset,
        length=arguments.length,
        minimum=arguments.minimum,
        dry_run=arguments.dry_run,
    )
    if arguments.json:
        dump("trim", {"trimmed": trimmed, "dry_run": arguments.dry_run})
    elif arguments.verbose or arguments.dry_run:
        would = " (dry run)" if arguments.dry_run else ""
        print(f"{path}: {human(trimmed)} ({trimmed} bytes) trimmed{would}")
    return ExitCode.OK
