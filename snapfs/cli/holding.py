"""Which snapshots stay, and what is said of them: delete, pin, unpin, note."""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase
from typing import Any

from ..client.documents import error_values
from ..client.naming import WILD, split_names
from ..client.wire import Client, RemoteError
from ..errors import ExitCode
from .arguments import Verbs, add_json, add_words
from .guarding import Misused
from .output import complain, dump, human

PATHS = "or paths MOUNTPOINT/snapshots/NAME"


def add_to(verbs: Verbs) -> None:
    """Add our commands."""
    verb = verbs.add_parser("delete", help="delete snapshots")
    add_words(verb, "MOUNTPOINT NAME...", f"{PATHS}; a NAME may be a pattern, such as 'auto-*'")
    verb.add_argument("-n", "--dry-run", action="store_true", help="say what would be deleted")
    add_json(verb)
    verb.set_defaults(run=delete)

    for name, text in (
        ("pin", "keep snapshots from being deleted"),
        ("unpin", "let pinned snapshots be deleted again"),
    ):
        verb = verbs.add_parser(name, help=text)
        add_words(verb, "MOUNTPOINT NAME...", f"{PATHS}; a NAME may be a pattern")
        add_json(verb)
        verb.set_defaults(run=pin, pinned=name == "pin")

    verb = verbs.add_parser("note", help="say something else of a snapshot")
    add_words(verb, "MOUNTPOINT NAME TEXT", "or one path and TEXT, which may be ''")
    add_json(verb)
    verb.set_defaults(run=note)


def delete(arguments: argparse.Namespace) -> int:
    """snapfs delete MOUNTPOINT NAME...: all that can be deleted, whatever happens to others."""
    deleted, failed, worst = _each(arguments, "delete", dry_run=arguments.dry_run)
    if arguments.json:
        dump("delete", {"deleted": deleted, "failed": failed, "dry_run": arguments.dry_run})
    elif arguments.dry_run:
        for snapshot in deleted:
            print(f"would delete {snapshot['name']}, freeing up to {human(snapshot['temp_bytes'])}")
    return worst


def pin(arguments: argparse.Namespace) -> int:
    """snapfs pin, and unpin, MOUNTPOINT NAME...: as delete."""
    changed, failed, worst = _each(arguments, "annotate", pinned=arguments.pinned)
    if arguments.json:
        dump(arguments.command, {"snapshots": changed, "failed": failed})
    return worst


def note(arguments: argparse.Namespace) -> int:
    """snapfs note MOUNTPOINT NAME TEXT."""
    *words, text = arguments.words
    mount, names = split_names(words) if words else (None, [])
    if mount is None or len(names) != 1:
        raise Misused("it takes one snapshot and the text, in quotes")
    with Client(mount) as client:
        snapshot = client.call("annotate", name=names[0], note=text)
    if arguments.json:
        dump("note", {"snapshot": snapshot})
    return ExitCode.OK


Results = list[dict[str, Any]]


def _each(
    arguments: argparse.Namespace, request: str, **details: Any
) -> tuple[Results, Results, int]:
    """What a request says of each of several snapshots; what fails; the exit status."""
    mount, words = split_names(arguments.words)
    if not words:
        raise Misused("say which snapshots: names, or patterns such as 'auto-*'")
    done: Results = []
    failed: Results = []
    worst = int(ExitCode.OK)
    with Client(mount) as client:
        names, unmatched = _meant(client, words)
        for word in unmatched:
            text = f"no snapshot of {mount.mountpoint} matches {word!r}"
            values = {"code": "snapshot-not-found", "message": text, "exit_code": 5}
            failed.append({"name": word, **values})
            worst = complain(text, ExitCode.NOT_FOUND)
        for name in names:
            try:
                done.append(client.call(request, name=name, **details))
            except RemoteError as error:
                failed.append({"name": name, **error_values(error)})
                worst = complain(str(error), error.exit_status)
    return done, failed, worst if not done or worst == ExitCode.OK else ExitCode.PARTIAL


def _meant(client: Client, words: list[str]) -> tuple[list[str], list[str]]:
    """The names that words mean, each once, and the patterns that match none.

    A pattern matches none that a backup has made for itself.
    """
    if not any(WILD & set(word) for word in words):
        return list(dict.fromkeys(words)), []
    from ..backup.chain import is_backups_own  # noqa: PLC0415 - only patterns need it

    known = [each["name"] for each in client.call("list")["snapshots"]]
    names: dict[str, None] = {}
    unmatched = []
    for word in words:
        if word in known or not WILD & set(word):
            names[word] = None
            continue
        found = [name for name in known if fnmatchcase(name, word) and not is_backups_own(name)]
        names.update(dict.fromkeys(found))
        if not found:
            unmatched.append(word)
    return list(names), unmatched
