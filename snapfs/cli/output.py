"""Printing: JSON documents, tables, complaints."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..client.documents import document, human
from .terminal import printable

__all__ = ["complain", "dump", "human", "print_pairs", "print_table"]


def dump(command: str, values: Mapping[str, Any]) -> None:
    """Print one JSON document in the wrapper that names its version."""
    import json  # noqa: PLC0415 - not for --help

    print(json.dumps(document(command, values), indent=2))


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under a head, columns aligned; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    for row in [list(head), *cells]:
        padded = (
            cell.rjust(width) if cell.isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        )
        print("  ".join(padded).rstrip())


def print_pairs(values: Mapping[str, Any], prefix: str = "") -> None:
    """Print "key: value" lines, keys of what is nested joined by dots."""
    for key, value in values.items():
        if isinstance(value, dict):
            print_pairs(value, f"{prefix}{key}.")
        elif value not in (None, []):
            print(f"{prefix}{key}: {value}")


def complain(message: str, status: int) -> int:
    """Say what is wrong on stderr, in one line, and return the exit status."""
    print("snapfs:", printable(" ".join(message.split())), file=sys.stderr)
    return status
