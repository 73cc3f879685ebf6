"""The command line's grammar: the families of commands put together."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from .. import __version__
from . import backups, bitmaps, checking, guiding, holding, mounting, points, snapshots, trimming
from .guarding import Misused

FAMILIES = (mounting, snapshots, holding, trimming, bitmaps, checking, backups, points, guiding)


class _Formatter(argparse.HelpFormatter):
    """Shows several arguments that are one list as they are to be written."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == argparse.ONE_OR_MORE and isinstance(action.metavar, str):
            return action.metavar
        return super()._format_args(action, default_metavar)


class Parser(argparse.ArgumentParser):
    """Raises Misused, which has the usage of the very command, for arguments that it does not take.

    Options may come between the other arguments.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Formatter, **kwargs})
        self.set_defaults(parser=self, command=self.command)
        self._mixing = False

    @property
    def command(self) -> str:
        """Its words, without the program: "bitmap add"."""
        return self.prog.partition(" ")[2]

    @property
    def _has_commands(self) -> bool:
        return any(each.nargs == argparse.PARSER for each in self._actions)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As the one of argparse, but nothing is left over."""
        words = sys.argv[1:] if args is None else args
        if self._mixing or self._has_commands or "--" in words:
            found, rest = super().parse_known_args(args, namespace)
        else:
            self._mixing = True
            try:
                found, rest = super().parse_known_intermixed_args(args, namespace)
            finally:
                self._mixing = False
        if rest and not self._mixing:
            self.error(self._left_over(rest))
        return found, rest

    def _left_over(self, rest: Sequence[str]) -> str:
        options = [word.partition("=")[0] for word in rest if word.startswith("-")]
        if not options:
            return f"what is {rest[0]!r} for? that is one argument too many"
        known = [name for action in self._actions for name in action.option_strings]
        return f"there is no option {options[0]}{_hint(options[0], known)}"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        if action.nargs == argparse.PARSER:  # a command, or an action of one
            what = f"action of {self.command}" if self.command else "command"
            more = _hint(str(value), known) or f"; see {self.prog} --help"
            raise Misused(f"there is no {what} {value!r}{more}", self.format_usage(), self.command)
        raise argparse.ArgumentError(action, f"{value!r} is none of {', '.join(known)}")

    def error(self, message: str) -> NoReturn:
        """What argparse calls."""
        raise Misused(message, self.format_usage(), self.command)


def _hint(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def build_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of all commands, each of which sets `run`, and each by its name."""
    parser = Parser(
        prog="snapfs",
        description="Serve a live disk image and its point-in-time snapshots as files.",
        epilog="mount -t fuse.snapfs IMAGE MOUNTPOINT works as well.  See snapfs(1).",
    )
    parser.add_argument("--version", action="version", version=f"snapfs {__version__}")
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")
    for family in FAMILIES:
        family.add_to(verbs)
    parser.set_defaults(top=parser)
    return parser, verbs.choices
