"""Copies and backups: copy, backup, restore.

The programs of snapfs.backup are imported when they are used.
"""

from __future__ import annotations

import argparse
import sys

from attrs import evolve

from ..errors import ExitCode
from .arguments import Verbs, add_wait, add_words, file_of, only, rate, time_span
from .guarding import Misused
from .jobs import Result, add_key_file, add_progress, chatter, long_job, say
from .output import dump, human


def add_to(verbs: Verbs) -> None:
    """Add our commands."""
    verb = verbs.add_parser("copy", help="copy what may be read of a snapshot")
    add_words(
        verb, "SNAPSHOT DEST", "a path or MOUNTPOINT NAME; a file, or a block device with --force"
    )
    verb.add_argument("--format", choices=("raw", "qcow2"), default="raw", help="of DEST")
    verb.add_argument("--backing", metavar="PREVIOUS", help="the image below a qcow2 DEST")
    verb.add_argument("--discard", action="store_true", help="give up what is safe at DEST")
    verb.add_argument("--force", action="store_true", help="overwrite; do not check for room")
    verb.add_argument(
        "--allow-missing", action="store_true", help="a new DEST need not be the whole image"
    )
    _add_rate(verb)
    verb.set_defaults(run=copy)

    verb = verbs.add_parser("backup", help="add a point to a backup directory")
    verb.add_argument("where", metavar="MOUNTPOINT", help="or, with --init, DIR")
    verb.add_argument("directory", metavar="DIR", nargs="?")
    verb.add_argument("--init", action="store_true", help="make DIR a backup directory")
    verb.add_argument("--full", action="store_true", help="copy everything")
    verb.add_argument(
        "--force", action="store_true", help="another image takes DIR over; do not check for room"
    )
    verb.add_argument("--compress", choices=("zstd",), help="store the data compressed")
    verb.add_argument(
        "--encrypt", action=argparse.BooleanOptionalAction, help="store the data encrypted"
    )
    add_key_file(verb)
    verb.add_argument(
        "--keep-snapshot-for", type=time_span, metavar="3d",
        help="how long an interrupted full point can be gone on with; default: 3d",
    )  # fmt: skip
    add_wait(verb)
    _add_rate(verb)
    verb.set_defaults(run=backup)

    verb = verbs.add_parser("restore", help="rebuild a point of a backup")
    verb.add_argument("directory", metavar="DIR")
    verb.add_argument("dest", metavar="DEST", help="a new file; a block device takes --force")
    verb.add_argument("--at", metavar="POINT", help="number, name or time; default: the newest")
    verb.add_argument("--force", action="store_true", help="overwrite; do not check for room")
    verb.add_argument(
        "--salvage", action="store_true", help="restore what is good and name what is not"
    )
    verb.add_argument(
        "--for-receive", action="store_true", help="note beside DEST what it holds, see receive"
    )
    add_key_file(verb)
    add_wait(verb)
    add_progress(verb)
    verb.set_defaults(run=restore)


def _add_rate(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--bwlimit", type=rate, metavar="BYTES", help="bytes a second at most")
    add_progress(verb)


def copy(arguments: argparse.Namespace) -> int:
    """snapfs copy SNAPSHOT DEST."""
    from ..backup import copies  # noqa: PLC0415

    *source, dest = only(arguments.words, 2, 3, "a snapshot and where it is to go")
    snapshot = file_of(source)
    options = copies.CopyOptions(
        format=arguments.format,
        backing=arguments.backing,
        discard=arguments.discard,
        force=arguments.force,
        allow_missing=arguments.allow_missing,
        bytes_per_second=arguments.bwlimit,
        progress_fd=arguments.progress,
        json=arguments.json,
        quiet=arguments.quiet,
    )

    def describe(result: Result) -> str:
        return f"{result['dest']}: {_amounts(result)}{_resumed(result)}"

    long_job(
        arguments,
        lambda: copies.copy(snapshot, dest, options),
        describe,
        interrupted="interrupted; the same command goes on where it was",
        out=sys.stderr,  # stdout may be where --progress goes
    )
    return ExitCode.OK


def _amounts(result: Result) -> str:
    disk = "" if result["disk_bytes"] is None else f" ({human(result['disk_bytes'])} on the disk)"
    return f"{human(result['copied_bytes'])} copied{disk}, {human(result['zero_bytes'])} of zeros"


def _resumed(result: Result) -> str:
    return f", resumed at {result['resumed_at']}" if result["resumed_at"] else ""


def backup(arguments: argparse.Namespace) -> int:
    """snapfs backup MOUNTPOINT DIR, and snapfs backup --init DIR."""
    from ..backup import chain, cycle  # noqa: PLC0415

    if arguments.init:
        if arguments.directory is not None:
            raise Misused("--init takes one argument, the directory")
        made = chain.init(arguments.where)
        if arguments.json:
            dump("backup", {"directory": made.path, "id": made.chain.id})
        return ExitCode.OK
    if arguments.directory is None:
        raise Misused("backup takes MOUNTPOINT and DIR")
    options = cycle.BackupOptions(
        full=arguments.full,
        force=arguments.force,
        compress=arguments.compress is not None,
        encrypt=arguments.encrypt,
        key_file=arguments.key_file,
        wait=arguments.wait,
        bytes_per_second=arguments.bwlimit,
        progress_fd=arguments.progress,
        json=arguments.json,
        quiet=arguments.quiet,
        say=say,
        chat=chatter(arguments),
    )
    if arguments.keep_snapshot_for is not None:
        options = evolve(options, keep_snapshot=arguments.keep_snapshot_for)
    long_job(
        arguments,
        lambda: cycle.backup(arguments.where, arguments.directory, options),
        lambda result: f"{result['point']}: {result['kind']}, {_amounts(result)}{_resumed(result)}",
        interrupted="interrupted; no point was added, and the next run has what this one had",
    )
    return ExitCode.OK


def restore(arguments: argparse.Namespace) -> int:
    """snapfs restore DIR DEST: 3 if something is missing that was salvaged around."""
    from ..backup import restoring  # noqa: PLC0415

    options = restoring.RestoreOptions(
        at=arguments.at,
        key_file=arguments.key_file,
        force=arguments.force,
        salvage=arguments.salvage,
        for_receive=arguments.for_receive,
        wait=arguments.wait,
        progress_fd=arguments.progress,
        json=arguments.json,
        quiet=arguments.quiet,
    )

    def describe(result: Result) -> str:
        lines = [f"{result['dest']}: point {result['point']}, {human(result['size'])}"]
        lines += [f"    not good: offset {start}, length {n}" for start, n in result["damaged"]]
        return "\n".join(lines)

    result = long_job(
        arguments,
        lambda: restoring.restore(arguments.directory, arguments.dest, options),
        describe,
        interrupted=f"interrupted; {arguments.dest} is marked as unfinished if anything was "
        "written, and the same command begins it again",
        wrong=lambda result: bool(result["damaged"]),
    )
    return ExitCode.PARTIAL if result["damaged"] else ExitCode.OK
