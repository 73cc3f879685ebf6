"""Long jobs: how they end, and how that is said."""

from __future__ import annotations

import argparse
import io
import json
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

from ..client.documents import document
from .arguments import add_json, descriptor

Result = dict[str, Any]


def add_progress(verb: argparse.ArgumentParser) -> None:
    """Add --progress, --quiet and --json."""
    add_quiet(verb)
    verb.add_argument("--progress", type=descriptor, metavar="FD", help="write lines N/100 there")
    add_json(verb)


def add_quiet(verb: argparse.ArgumentParser) -> None:
    """Add --quiet, of what says in lines of JSON how it goes."""
    verb.set_defaults(form="lines")
    verb.add_argument("--quiet", action="store_true", help="nothing unless something is wrong")


def add_key_file(verb: argparse.ArgumentParser) -> None:
    """Add --key-file."""
    verb.add_argument("--key-file", metavar="FILE", help="the key of points that are encrypted")


def _interrupted(*_signal: object) -> None:
    raise KeyboardInterrupt


def long_job(
    arguments: argparse.Namespace,
    job: Callable[[], Result],
    describe: Callable[[Result], str],
    *,
    interrupted: str,
    wrong: Callable[[Result], bool] = lambda result: False,
    out: TextIO | None = None,
) -> Result:
    """Run a job that SIGTERM and SIGHUP end as Ctrl-C does, and say how it went.

    `interrupted` says then what is left, and how to go on.  With --json its result is a line of
    JSON; with --quiet nothing is said of a result that is not `wrong`.
    """
    signal.signal(signal.SIGTERM, _interrupted)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup(1)
        signal.signal(signal.SIGHUP, _interrupted)
    try:
        result = job()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(interrupted) from None
    if arguments.json:
        values = {"message_type": "summary", **result}
        print(json.dumps(document(arguments.command, values)), flush=True)
    elif wrong(result) or not arguments.quiet:
        stream = sys.stdout if out is None else out
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # names are bytes, as the system has it
        print(describe(result), file=stream)
    return result


def say(message: str) -> None:
    """Say something that is no result."""
    print("snapfs:", message, file=sys.stderr)


def chatter(arguments: argparse.Namespace) -> Callable[[str], None]:
    """Says what nobody needs to know, unless --quiet was given."""
    return (lambda _message: None) if arguments.quiet else say
