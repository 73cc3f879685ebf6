"""The points of a backup directory: points, verify, prune.

The programs of snapfs.backup are imported when they are used.
"""

from __future__ import annotations

import argparse

from ..errors import ExitCode
from .arguments import Verbs, add_json, count
from .jobs import Result, add_progress, add_wait, long_job, say
from .output import dump, human, print_table


def add_to(verbs: Verbs) -> None:
    """Add our commands."""
    verb = verbs.add_parser("points", help="list the points of a backup")
    verb.add_argument("directory", metavar="DIR")
    add_json(verb)
    verb.set_defaults(run=points)

    verb = verbs.add_parser("verify", help="prove the checksums of a backup")
    verb.add_argument("directory", metavar="DIR")
    verb.add_argument("--at", metavar="POINT", help="only what this point takes")
    add_wait(verb)
    add_progress(verb)
    verb.set_defaults(run=verify)

    verb = verbs.add_parser("prune", help="fold old points of a backup into the next ones")
    verb.add_argument("directory", metavar="DIR")
    verb.add_argument("--keep-last", type=count, default=0, metavar="N", help="the newest")
    verb.add_argument("--keep-daily", type=count, default=0, metavar="N", help="one a day")
    verb.add_argument("--keep-weekly", type=count, default=0, metavar="N", help="one a week")
    verb.add_argument("--dry-run", action="store_true", help="say what would be dropped")
    add_wait(verb)
    add_json(verb)
    verb.set_defaults(run=prune)


def points(arguments: argparse.Namespace) -> int:
    """snapfs points DIR."""
    from ..backup import listing  # noqa: PLC0415

    found = listing.points(arguments.directory)
    if arguments.json:
        dump("points", {"points": found})
        return ExitCode.OK
    print_table(
        ("NUMBER", "TIME", "KIND", "SIZE", "ON DISK", "STANDS ON", "VERIFIED"),
        (
            (each["number"], _second(each["time"]), each["kind"], human(each["size"]),
             human(each["disk_bytes"]), each["parent"] or "-", _verified(each["verified"]))
            for each in found
        ),
    )  # fmt: skip
    return ExitCode.OK


def _second(time: str) -> str:
    return time[:19] + "Z"


def _verified(record: Result | None) -> str:
    if record is None:
        return "never"
    return f"{'good' if record['good'] else 'DAMAGED'} {_second(record['time'])}"


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

    options = verifying.VerifyOptions(
        at=arguments.at,
        wait=arguments.wait,
        progress_fd=arguments.progress,
        json=arguments.json,
    )
    result = long_job(arguments, lambda: verifying.verify(arguments.directory, options), describe)
    return ExitCode.SNAPSHOT_UNUSABLE if result["damaged"] else ExitCode.OK


def prune(arguments: argparse.Namespace) -> int:
    """snapfs prune DIR."""
    from ..backup import pruning  # noqa: PLC0415

    policy = pruning.Policy(arguments.keep_last, arguments.keep_daily, arguments.keep_weekly)
    long_job(
        arguments,
        lambda: pruning.prune(
            arguments.directory, policy, dry_run=arguments.dry_run, say=say, wait=arguments.wait
        ),
        lambda result: f"{len(result['kept'])} points kept, {len(result['dropped'])} dropped",
    )
    return ExitCode.OK
