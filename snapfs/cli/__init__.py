"""The command line: thin, over the control socket and the daemon.

One module for each family of commands; parser.py puts them together.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence

from ..daemon import standardfiles
from . import mounthelpers
from .guarding import Form, Misused, guarded
from .parser import COMMANDS, build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments, and the name of the program, ask for."""
    standardfiles.occupy()
    arguments = list(sys.argv[1:] if argv is None else argv)
    program = os.path.basename(sys.argv[0])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # names of files are bytes
    if program == "mount.snapfs":
        return mounthelpers.mount(arguments)
    if program in ("umount.snapfs", "umount.fuse.snapfs"):
        return mounthelpers.umount(arguments)
    if mounthelpers.is_mount_form(arguments, COMMANDS):
        arguments.insert(0, "mount")
    parser, _ = build_parser(arguments)
    mistaken: Form = "document" if "--json" in arguments else None
    try:
        parsed = parser.parse_args(arguments)
        if not hasattr(parsed, "run"):
            parser.error("say what to do; see snapfs --help")
    except Misused as error:
        return guarded(_raising(error), form=mistaken)
    form: Form = getattr(parsed, "form", "document") if getattr(parsed, "json", False) else None
    usage = parsed.parser.format_usage()
    return guarded(
        lambda: int(parsed.run(parsed) or 0), command=parsed.command, usage=usage, form=form
    )


def _raising(error: Misused) -> Callable[[], int]:
    def run() -> int:
        raise error

    return run
