"""`snapfs prune`: taking out what the rules do not keep, points of a backup or snapshots."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any

from attrs import field, frozen

from ..client.older import complete_list
from ..client.wire import Client, RemoteError
from ..errors import BackupError, NoRoom, PointDamaged, UsageError
from . import folding, qemu
from .chain import is_backups_own, opened
from .retention import Policy


@frozen
class PruneOptions:
    """What the command line says.  `pattern` is for snapshots."""

    policy: Policy
    pattern: str | None = None
    key_file: str | None = None
    dry_run: bool = False
    wait: float = 0.0
    say: Callable[[str], None] = field(default=print)
    chat: Callable[[str], None] = field(default=print)


def prune(path: str, options: PruneOptions) -> dict[str, Any]:
    """Take out the points that the policy does not keep; returns what was kept by which rule.

    `failed` has those that cannot be folded, for they are damaged; all the others go.
    """
    options.policy.refuse_empty()
    if options.pattern is not None:
        raise UsageError("--pattern is for the snapshots of a mount; a backup has points")
    qemu.find_program("qemu-img")
    dry_run = options.dry_run
    failed: list[str] = []
    with opened(
        path, change=not dry_run, wait=options.wait, key_file=options.key_file
    ) as directory:
        chain = directory.chain
        points = chain.points
        rules = options.policy.kept(points)
        deleted = folding.loose(chain, rules.keys())
        folded = [each.name for each in points if each.name not in {*rules, *deleted}]
        if not dry_run:
            # What frees space comes before anything that needs some.
            directory.sweep()
            with directory.without_readers(options.wait):
                folding.delete(directory, deleted)
                if folded or directory.chain.fold is not None:
                    directory.refuse_key(reversed(directory.chain.points))
                folding.finish(directory)
                for name in folded:
                    options.chat(f"folding {name} into the next point")
                    try:
                        folding.fold(directory, name)
                    except (PointDamaged, BackupError) as error:
                        if isinstance(error, NoRoom) or directory.chain.fold is not None:
                            raise
                        options.say(f"point {name} stays: {error}")
                        rules[name] = ["damaged"]
                        failed.append(name)
    rows = [
        {"number": point.number, "name": point.name, "time": point.created,
         "kept_by": rules.get(point.name)}
        for point in points
    ]  # fmt: skip
    return {**_summary("points", rows, options), "failed": failed}


@frozen
class _Snapshot:
    name: str
    time: datetime


def prune_snapshots(mountpoint: str, options: PruneOptions) -> dict[str, Any]:
    """The same for the snapshots of a mount whose names the pattern matches.

    Those of backups under way are never meant.  `failed` has those that could not be deleted.
    """
    options.policy.refuse_empty()
    if options.pattern is None:
        raise UsageError("say which snapshots: --pattern 'auto-*'")
    failed: list[str] = []
    with Client(mountpoint) as client:
        listed = complete_list(client.call("list"))["snapshots"]
        found = [
            _Snapshot(each["name"], datetime.fromisoformat(each["created"]))
            for each in listed
            if fnmatchcase(each["name"], options.pattern) and not is_backups_own(each["name"])
        ]
        rules = options.policy.kept(found)
        pinned = {each["name"] for each in listed if each["pinned"]}
        for each in found:
            if each.name in pinned:
                rules.setdefault(each.name, []).append("pinned")
        for each in found:
            if each.name not in rules and not options.dry_run:
                try:
                    client.call("delete", name=each.name)
                except RemoteError as error:
                    options.say(str(error))
                    failed.append(each.name)
    rows = [
        {"name": each.name, "time": each.time.isoformat().replace("+00:00", "Z"),
         "kept_by": rules.get(each.name)}
        for each in found
    ]  # fmt: skip
    return {**_summary("snapshots", rows, options), "failed": failed}


def _summary(what: str, rows: list[dict[str, Any]], options: PruneOptions) -> dict[str, Any]:
    return {
        what: rows,
        "kept": [row["name"] for row in rows if row["kept_by"] is not None],
        "dropped": [row["name"] for row in rows if row["kept_by"] is None],
        "dry_run": options.dry_run,
    }
