"""Copies and backups: copy, backup, restore, verify, prune.

The programs of snapfs.backup are imported when they are used.
"""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

from ..client.wire import RemoteError
from ..errors import ExitCode, SnapfsError, UsageError
from .arguments import Verbs, add_json, count, descriptor, rate
from .output import dump, human

Result = dict[str, Any]


def add_to(verbs: Verbs) -> None:
    """Add our commands."""
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
    verb.set_defaults(run=copy)

    verb = verbs.add_parser("backup", help="add a point to a backup directory")
    verb.add_argument("where", metavar="MOUNTPOINT", help="or, with --init, DIR")
    verb.add_argument("directory", metavar="DIR", nargs="?")
    verb.add_argument("--init", action="store_true", help="make DIR a backup directory")
    verb.add_argument("--full", action="store_true", help="copy everything")
    verb.add_argument(
        "--force", action="store_true", help="another image takes DIR over; do not check for room"
    )
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
    _add_progress(verb)
    verb.set_defaults(run=restore)

    verb = verbs.add_parser("verify", help="prove the checksums of a backup")
    verb.add_argument("directory", metavar="DIR")
    verb.add_argument("--at", metavar="POINT", help="only what this point takes")
    _add_progress(verb)
    verb.set_defaults(run=verify)

    verb = verbs.add_parser("prune", help="fold old points of a backup into the next ones")
    verb.add_argument("directory", metavar="DIR")
    verb.add_argument("--keep-last", type=count, default=0, metavar="N", help="the newest")
    verb.add_argument("--keep-daily", type=count, default=0, metavar="N", help="one a day")
    verb.add_argument("--keep-weekly", type=count, default=0, metavar="N", help="one a week")
    verb.add_argument("--dry-run", action="store_true", help="say what would be dropped")
    add_json(verb)
    verb.set_defaults(run=prune)


def _add_rate(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--bwlimit", type=rate, metavar="BYTES", help="bytes a second at most")
    _add_progress(verb)


def _add_progress(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--progress", type=descriptor, metavar="FD", help="write lines N/100 there")
    add_json(verb)


def _interrupted(*_signal: object) -> None:
    raise KeyboardInterrupt


def _long_job(
    arguments: argparse.Namespace,
    job: Callable[[], Result],
    describe: Callable[[Result], str],
    out: TextIO | None = None,
) -> Result:
    """Run a job that SIGTERM and SIGHUP end as Ctrl-C does, and say how it went.

    With --json its end is a line of JSON, whatever the end is.
    """
    from ..backup.progress import emit  # noqa: PLC0415

    signal.signal(signal.SIGTERM, _interrupted)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup(1)
        signal.signal(signal.SIGHUP, _interrupted)
    try:
        result = job()
    except (SnapfsError, OSError) as error:
        if arguments.json:
            if isinstance(error, RemoteError):
                code = error.exit_status
            else:
                code = int(error.exit_code) if isinstance(error, SnapfsError) else ExitCode.ERROR
            emit("error", {"message": str(error), "exit_code": int(code)})
        raise
    if arguments.json:
        emit("summary", result)
    else:
        stream = sys.stdout if out is None else out
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # names are bytes, as the system has it
        print(describe(result), file=stream)
    return result


def copy(arguments: argparse.Namespace) -> int:
    """snapfs copy SNAPSHOT DEST."""
    from ..backup import copies  # noqa: PLC0415

    options = copies.CopyOptions(
        format=arguments.format,
        backing=arguments.backing,
        discard=arguments.discard,
        force=arguments.force,
        allow_missing=arguments.allow_missing,
        bytes_per_second=arguments.bwlimit,
        progress_fd=arguments.progress,
        json=arguments.json,
    )

    def describe(result: Result) -> str:
        resumed = f", resumed at {result['resumed_at']}" if result["resumed_at"] else ""
        return f"{result['dest']}: {_amounts(result)}{resumed}"

    _long_job(
        arguments,
        lambda: copies.copy(arguments.snapshot, arguments.dest, options),
        describe,
        sys.stderr,  # stdout may be where --progress goes
    )
    return ExitCode.OK


def _amounts(result: Result) -> str:
    return f"{human(result['copied_bytes'])} copied, {human(result['zero_bytes'])} of zeros"


def _say(message: str) -> None:
    print("snapfs:", message, file=sys.stderr)


def backup(arguments: argparse.Namespace) -> int:
    """snapfs backup MOUNTPOINT DIR, and snapfs backup --init DIR."""
    from ..backup import chain, cycle  # noqa: PLC0415

    if arguments.init:
        if arguments.directory is not None:
            raise UsageError("--init takes one argument, the directory")
        made = chain.init(arguments.where)
        if arguments.json:
            dump("backup", {"directory": made.path, "id": made.chain.id})
        return ExitCode.OK
    if arguments.directory is None:
        raise UsageError("backup takes MOUNTPOINT and DIR")
    options = cycle.BackupOptions(
        full=arguments.full,
        force=arguments.force,
        bytes_per_second=arguments.bwlimit,
        progress_fd=arguments.progress,
        json=arguments.json,
        say=_say,
    )
    _long_job(
        arguments,
        lambda: cycle.backup(arguments.where, arguments.directory, options),
        lambda result: f"{result['point']}: {result['kind']}, {_amounts(result)}",
    )
    return ExitCode.OK


def restore(arguments: argparse.Namespace) -> int:
    """snapfs restore DIR DEST: 3 if something is missing that was salvaged around."""
    from ..backup import restoring  # noqa: PLC0415

    options = restoring.RestoreOptions(
        at=arguments.at,
        force=arguments.force,
        salvage=arguments.salvage,
        progress_fd=arguments.progress,
        json=arguments.json,
    )

    def describe(result: Result) -> str:
        lines = [f"{result['dest']}: point {result['point']}, {human(result['size'])}"]
        lines += [f"    not good: offset {start}, length {n}" for start, n in result["damaged"]]
        return "\n".join(lines)

    result = _long_job(
        arguments,
        lambda: restoring.restore(arguments.directory, arguments.dest, options),
        describe,
    )
    return ExitCode.PARTIAL if result["damaged"] else ExitCode.OK


def verify(arguments: argparse.Namespace) -> int:
    """snapfs verify DIR."""
    from ..backup import verifying  # noqa: PLC0415

    def describe(result: Result) -> str:
        lines = []
        for point in result["points"]:
            lines.append(f"{point['point']}: {'good' if point['ok'] else 'DAMAGED'}")
            lines += [f"    {problem}" for problem in point["problems"]]
        if result["damaged"]:
            first = result["good_from"]
            lines.append(f"from {first} on all is good" if first else "the newest point is damaged")
        return "\n".join(lines) or "there are no points yet"

    result = _long_job(
        arguments,
        lambda: verifying.verify(
            arguments.directory, arguments.at, arguments.progress, arguments.json
        ),
        describe,
    )
    return ExitCode.SNAPSHOT_UNUSABLE if result["damaged"] else ExitCode.OK


def prune(arguments: argparse.Namespace) -> int:
    """snapfs prune DIR."""
    from ..backup import pruning  # noqa: PLC0415

    policy = pruning.Policy(arguments.keep_last, arguments.keep_daily, arguments.keep_weekly)
    _long_job(
        arguments,
        lambda: pruning.prune(arguments.directory, policy, dry_run=arguments.dry_run, say=_say),
        lambda result: f"{len(result['kept'])} points kept, {len(result['dropped'])} dropped",
    )
    return ExitCode.OK
