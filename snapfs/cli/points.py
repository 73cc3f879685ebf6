"""The points of a backup directory: points, verify, prune.

The programs of snapfs.backup are imported when they are used.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ..client import mountinfo
from ..errors import ExitCode, NotMounted
from .arguments import Verbs, add_json, add_wait, count, time_span
from .jobs import Result, add_key_file, add_progress, add_quiet, chatter, long_job, say
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
    add_key_file(verb)
    add_wait(verb)
    add_progress(verb)
    verb.set_defaults(run=verify)

    verb = verbs.add_parser("prune", help="take out old points of a backup, or old snapshots")
    verb.add_argument("where", metavar="DIR|MOUNTPOINT")
    for rule in ("last", "hourly", "daily", "weekly", "monthly", "yearly"):
        text = "the newest" if rule == "last" else f"the newest of each of N {_NOUNS[rule]}"
        verb.add_argument(f"--keep-{rule}", type=count, default=0, metavar="N", help=text)
    verb.add_argument(
        "--keep-within", type=time_span, metavar="30d", help="all not older than the newest by more"
    )
    verb.add_argument(
        "--pattern", metavar="GLOB", help="the snapshots of MOUNTPOINT that are meant"
    )
    verb.add_argument("--dry-run", action="store_true", help="say what would be dropped")
    add_key_file(verb)
    add_wait(verb)
    add_quiet(verb)
    add_json(verb)
    verb.set_defaults(run=prune)


_NOUNS = {"hourly": "hours", "daily": "days", "weekly": "weeks", "monthly": "months",
          "yearly": "years"}  # fmt: skip


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
            if point["ok"] and arguments.quiet:
                continue
            lines.append(f"{point['point']}: {'good' if point['ok'] else 'DAMAGED'}")
            lines += [f"    {problem}" for problem in point["problems"]]
        if result["damaged"]:
            first = result["good_from"]
            lines.append(f"from {first} on all is good" if first else "the newest point is damaged")
        return "\n".join(lines) or "there are no points yet"

    options = verifying.VerifyOptions(
        at=arguments.at,
        key_file=arguments.key_file,
        wait=arguments.wait,
        progress_fd=arguments.progress,
        json=arguments.json,
        quiet=arguments.quiet,
    )
    result = long_job(
        arguments,
        lambda: verifying.verify(arguments.directory, options),
        describe,
        interrupted="interrupted; nothing but what verify has found by now was changed",
        wrong=lambda result: bool(result["damaged"]),
    )
    return ExitCode.SNAPSHOT_UNUSABLE if result["damaged"] else ExitCode.OK


def prune(arguments: argparse.Namespace) -> int:
    """snapfs prune DIR, and snapfs prune MOUNTPOINT: 3 if something could not be taken out."""
    from ..backup import pruning, retention  # noqa: PLC0415

    policy = retention.Policy(
        last=arguments.keep_last,
        hourly=arguments.keep_hourly,
        daily=arguments.keep_daily,
        weekly=arguments.keep_weekly,
        monthly=arguments.keep_monthly,
        yearly=arguments.keep_yearly,
        within=arguments.keep_within,
    )
    options = pruning.PruneOptions(
        policy=policy,
        pattern=arguments.pattern,
        key_file=arguments.key_file,
        dry_run=arguments.dry_run,
        wait=arguments.wait,
        say=say,
        chat=chatter(arguments),
    )
    job: Callable[[str, pruning.PruneOptions], Result]
    try:
        mountinfo.around(arguments.where)
    except NotMounted:
        what, job = "points", pruning.prune
    else:
        what, job = "snapshots", pruning.prune_snapshots

    def describe(result: Result) -> str:
        verdict = "would go" if arguments.dry_run else "dropped"
        print_table(
            ("NUMBER" if what == "points" else "NAME", "TIME", "KEPT BY"),
            (
                (row.get("number", row["name"]), _second(row["time"]), _rules(row, verdict))
                for row in result[what]
            ),
        )
        return f"{len(result['kept'])} {what} kept, {len(result['dropped'])} {verdict}"

    result = long_job(
        arguments,
        lambda: job(arguments.where, options),
        describe,
        interrupted="interrupted; what is left reads as before, and the same command goes on",
    )
    return ExitCode.PARTIAL if result.get("failed") else ExitCode.OK


def _rules(row: Result, verdict: str) -> str:
    if row["kept_by"] is None:
        return f"- {verdict}"
    return ", ".join(row["kept_by"]) or "the newest"
