"""What goes to a terminal: colours, widths, and names that must not move the cursor."""

from __future__ import annotations

import os
import sys
from typing import TextIO

COLOURS = {"red": "31", "green": "32", "yellow": "33", "bold": "1", "dim": "2"}


def wants_colour(choice: str = "auto", stream: TextIO | None = None) -> bool:
    """Are colours wanted there: --color over NO_COLOR over FORCE_COLOR over a terminal?"""
    if choice != "auto":
        return choice == "always"
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return (stream or sys.stdout).isatty() and os.environ.get("TERM") != "dumb"


def columns(stream: TextIO | None = None) -> int | None:
    """Columns of a terminal, None if it is none, or does not tell."""
    try:
        fd = (stream or sys.stdout).fileno()
        return os.get_terminal_size(fd).columns or None
    except (OSError, ValueError):
        return None


class Painter:
    """Puts text in colours, or leaves it as it is."""

    def __init__(self, colour: bool) -> None:
        self._colour = colour

    def __call__(self, text: str, *names: str) -> str:
        """The text in these of COLOURS."""
        if not self._colour or not names:
            return text
        return f"\x1b[{';'.join(COLOURS[name] for name in names)}m{text}\x1b[0m"


def printable(text: str) -> str:
    """A name without what a terminal obeys: control characters as \\xNN."""
    return "".join(
        letter
        if letter.isprintable() or "\udc80" <= letter <= "\udcff"
        else f"\\x{ord(letter):02x}"
        for letter in text
    )
