"""What helps with the command line itself: help, completion."""

from __future__ import annotations

import argparse
import sys

from ..errors import ExitCode, SnapfsError
from . import completing
from .arguments import Verbs
from .guarding import Misused


def add_to(verbs: Verbs) -> None:
    """Add our commands; they need `top`, the parser of all."""
    verb = verbs.add_parser("help", help="say how a command is used")
    verb.add_argument("words", metavar="COMMAND", nargs="*", help="such as list, or bitmap add")
    verb.set_defaults(run=show_help)

    verb = verbs.add_parser("completion", help="print what has a shell complete our words")
    verb.add_argument("words", metavar="bash|zsh|fish", nargs="*")
    verb.add_argument("--for", dest="kind", choices=completing.KINDS, help=argparse.SUPPRESS)
    verb.set_defaults(run=completion)


def show_help(arguments: argparse.Namespace) -> int:
    """snapfs help [COMMAND]."""
    arguments.top.parse_args([*arguments.words, "--help"])
    return ExitCode.OK  # not reached: --help ends it


def _commands(parser: argparse.ArgumentParser) -> list[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return list(action.choices)
    return []


def completion(arguments: argparse.Namespace) -> int:
    """snapfs completion SHELL; with --for what the shell asks for while a line is typed."""
    if arguments.kind is not None:
        for word in completing.candidates(
            arguments.kind, arguments.words, _commands(arguments.top)
        ):
            print(word)
        return ExitCode.OK
    if len(arguments.words) != 1 or arguments.words[0] not in completing.SHELLS:
        raise Misused(f"say for which shell: one of {', '.join(completing.SHELLS)}")
    try:
        sys.stdout.write(completing.script(arguments.top, arguments.words[0]))
    except ImportError:
        raise SnapfsError(
            "completion takes the Python package shtab, 1.9.3 or newer: install it where "
            "snapfs is installed (pip install 'shtab>=1.9.3')"
        ) from None
    return ExitCode.OK
