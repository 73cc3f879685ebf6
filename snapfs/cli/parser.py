"""The command line's grammar: the families of commands put together."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn, cast

from .. import __version__
from .guarding import Misused

# Which family has a command, and what it says of itself: known without importing any.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "mount": ("mounting", "serve an image at a mountpoint"),
    "umount": ("mounting", "unmount; returns when all is flushed"),
    "create": ("snapshots", "take a snapshot"),
    "list": ("snapshots", "list snapshots"),
    "show": ("snapshots", "show one snapshot"),
    "limit": ("snapshots", "bound the space of the temp images"),
    "events": ("snapshots", "wait for what happens to the snapshots and print it"),
    "status": ("status", "show what is wrong with a mount, and how it is"),
    "metrics": ("metrics", "print metrics for Prometheus"),
    "delete": ("holding", "delete snapshots"),
    "pin": ("holding", "keep snapshots from being deleted"),
    "unpin": ("holding", "let pinned snapshots be deleted again"),
    "note": ("holding", "say something else of a snapshot"),
    "trim": ("trimming", "discard a range, as fstrim does"),
    "map": ("bitmaps", "list the extents of active or of a snapshot"),
    "diff": ("bitmaps", "list what differs between snapshots, or from now"),
    "bitmap": ("bitmaps", "track what changes, in dirty bitmaps"),
    "check": ("checking", "look a state directory over, not mounted"),
    "copy": ("backups", "copy what may be read of a snapshot"),
    "backup": ("backups", "add a point to a backup directory"),
    "restore": ("backups", "rebuild a point of a backup"),
    "points": ("points", "list the points of a backup"),
    "verify": ("points", "prove the checksums of a backup"),
    "prune": ("points", "take out old points of a backup, or old snapshots"),
    "send": ("streams", "write a snapshot, or what changed up to it, to a pipe"),
    "receive": ("streams", "apply what snapfs send writes to an image"),
    "help": ("guiding", "say how a command is used"),
    "completion": ("guiding", "print what has a shell complete our words"),
}
OF_ALL = {"guiding"}  # families that need the parser of all commands


class _Formatter(argparse.HelpFormatter):
    """Shows several arguments that are one list as they are to be written.

    As wide as the terminal; argparse would import shutil to know, which takes a while.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_columns() - 2)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == argparse.ONE_OR_MORE and isinstance(action.metavar, str):
            return action.metavar
        return super()._format_args(action, default_metavar)


def _columns() -> int:
    try:
        return int(os.environ["COLUMNS"]) or 80
    except (KeyError, ValueError):
        pass
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


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
        more = _hint(options[0], known) or f"; see {self.prog} --help"
        return f"there is no option {options[0]}{more}"

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
    import difflib  # noqa: PLC0415 - for who mistypes

    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


class _Name:
    """Stands for the parser of a command that is listed and nothing else."""

    def __init__(self, **_options: object) -> None:
        pass


def family(name: str) -> ModuleType:
    """The module of a family, by its name in COMMANDS."""
    return importlib.import_module(f".{name}", __package__)


def build_parser(
    words: Sequence[str] | None = None,
) -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser of all commands, each of which sets `run`, and each by its name.

    With `words`, which are to be parsed, only what they need is there: one family of commands,
    or the names of all if there is no command among them.
    """
    parser = Parser(
        prog="snapfs",
        description="Serve a live disk image and its point-in-time snapshots as files.",
        epilog="mount -t fuse.snapfs IMAGE MOUNTPOINT works as well.  See snapfs(1).",
    )
    parser.add_argument("--version", action="version", version=f"snapfs {__version__}")
    first = next((word for word in words or () if not word.startswith("-")), None)
    named = words is not None and first is None
    verbs = parser.add_subparsers(
        title="commands",
        metavar="COMMAND",
        parser_class=cast(Any, _Name) if named else Parser,
    )
    wanted = dict.fromkeys(name for name, _ in COMMANDS.values())
    if named:
        for name, (_, text) in COMMANDS.items():
            verbs.add_parser(name, help=text)
        wanted = {}
    elif first is not None and first in COMMANDS and COMMANDS[first][0] not in OF_ALL:
        wanted = {COMMANDS[first][0]: None}
    for name in wanted:
        family(name).add_to(verbs)
    parser.set_defaults(top=parser)
    return parser, verbs.choices
