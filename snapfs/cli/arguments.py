"""What arguments of several commands have in common: types, and --json."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeAlias

from ..errors import UsageError
from .guarding import Misused

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What a family of commands adds itself to; each command sets `run`."""


def size(text: str) -> int:
    """A size with a unit, in bytes."""
    from ..daemon.options import parse_size  # noqa: PLC0415 - what few need to start

    try:
        return parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def size_or_none(text: str) -> int | None:
    """A size, or "none"."""
    return None if text == "none" else size(text)


def rate(text: str) -> int:
    """Bytes a second."""
    found = size(text)
    if not found:
        raise argparse.ArgumentTypeError("a rate of 0 never ends; leave the option out")
    return found


def count(text: str) -> int:
    """How many."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return int(text)


def time_span(text: str) -> timedelta:
    """A time span such as 30d or 36h."""
    from ..backup.retention import parse_within  # noqa: PLC0415 - when it is used

    try:
        return parse_within(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def descriptor(text: str) -> int:
    """A descriptor that is open."""
    found = count(text)
    try:
        os.fstat(found)
    except (OSError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text} is not an open descriptor") from None
    return found


def add_words(verb: argparse.ArgumentParser, form: str, text: str) -> None:
    """Add several arguments as one list `words`: how many there may be is for the command to say.

    `form` is how usage shows them.
    """
    verb.add_argument("words", metavar=form, nargs="+", help=text)


def only(words: Sequence[str], least: int, most: int, what: str) -> Sequence[str]:
    """The words if there are as many as there may be; raises Misused that says `what` is wanted."""
    if not least <= len(words) <= most:
        raise Misused(f"it takes {what}, and here are {len(words)}: {' '.join(words)}".rstrip(": "))
    return words


def file_of(words: Sequence[str]) -> str:
    """The file that `FILE`, or `MOUNTPOINT NAME` of a snapshot, means."""
    only(words, 1, 2, "one file, or a mountpoint and a name")
    if len(words) == 1:
        return words[0]
    from ..client.naming import split_names  # noqa: PLC0415 - only for two

    mount, names = split_names(words)
    return os.path.join(mount.mountpoint, "snapshots", only(names, 1, 1, "one snapshot")[0])


def add_wait(
    verb: argparse.ArgumentParser,
    what: str = "for another snapfs that works in DIR; without SECONDS as long as it takes",
) -> None:
    """Add --wait."""
    verb.add_argument(
        "--wait", type=_seconds, nargs="?", const=math.inf, default=0.0, metavar="SECONDS",
        help=what,
    )  # fmt: skip


def _seconds(text: str) -> float:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of seconds; put --wait behind the other arguments"
        )
    return float(text)


def add_json(verb: argparse.ArgumentParser) -> None:
    """Add --json."""
    verb.add_argument("--json", action="store_true", help="print JSON")
