"""The list of snapshots, of one mount or of all; and asking all mounts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ..client.documents import error_values
from ..errors import ExitCode, SnapfsError, code_of
from .output import complain, dump, human, print_table
from .terminal import printable

HEADS = ("NAME", "CREATED", "SIZE", "TEMP", "STATE", "NOTE")


def list_row(each: dict[str, Any]) -> tuple[str, ...]:
    """What list says of a snapshot, by HEADS."""
    return (
        printable(each["name"]), printable(each["created"][:19]) + "Z", human(each["size"]),
        human(each["temp_bytes"]), printable(each["state"]) + ", pinned" * bool(each["pinned"]),
        printable(each["note"] or ""),
    )  # fmt: skip


Asked = tuple[Any, Mapping[str, Any] | None, str | None]  # mount, answer, or why there is none


def ask(command: Literal["status", "list"], worst: list[int]) -> Iterator[Asked]:
    """What all mounts answer; `worst`, a list of one, is what becomes of the exit status.

    Those of other users, which we may not look at, do no harm.
    """
    from ..client import everywhere  # noqa: PLC0415

    for mount, answer in everywhere.ask(command):
        if isinstance(answer, SnapfsError):
            values = error_values(answer)
            if values["code"] != code_of("NotPermitted"):
                worst[0] = worst[0] or values["exit_code"]
            yield mount, None, values["message"]
        else:
            yield mount, answer, None


def end(command: str, documents: list[Mapping[str, Any]], as_json: bool) -> None:
    """Print what all mounts said, in JSON; or that there is none."""
    if as_json:
        dump(command, {"mounts": documents})
    elif not documents:
        print("no snapfs is mounted", file=sys.stderr)


def list_all(arguments: argparse.Namespace) -> int:
    """snapfs list: the snapshots of all mounts."""
    worst = [int(ExitCode.OK)]
    documents: list[Mapping[str, Any]] = []
    rows: list[tuple[str, ...]] = []
    for mount, answer, error in ask("list", worst):
        snapshots = [] if answer is None else answer["snapshots"]
        documents.append({"mountpoint": mount.mountpoint, "snapshots": snapshots, "error": error})
        if any(each["state"] != "ok" for each in snapshots):
            worst[0] = worst[0] or ExitCode.SNAPSHOT_UNUSABLE
        if error is not None and not arguments.json:
            complain(f"{printable(mount.mountpoint)}: {error}", worst[0])
        where = printable(mount.mountpoint)
        rows += [(where, *list_row(each)) for each in snapshots]
    if documents and not arguments.json:
        print_table(("MOUNTPOINT", *HEADS), rows)
    end("list", documents, arguments.json)
    return worst[0]
