"""What arguments of several commands have in common: types, and --json."""

from __future__ import annotations

import argparse
import os
from typing import TypeAlias

from ..daemon.options import parse_size
from ..errors import UsageError

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What a family of commands adds itself to; each command sets `run`."""


def size(text: str) -> int:
    """A size with a unit, in bytes."""
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


def descriptor(text: str) -> int:
    """A descriptor that is open."""
    found = count(text)
    try:
        os.fstat(found)
    except (OSError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text} is not an open descriptor") from None
    return found


def add_json(verb: argparse.ArgumentParser) -> None:
    """Add --json."""
    verb.add_argument("--json", action="store_true", help="print JSON")
