"""The forms in which mount(8) and umount(8) call snapfs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Container, Sequence

from ..client.reasons import why
from ..errors import HelperExit, NotPermitted, SnapfsError, UsageError
from .guarding import guarded
from .output import complain


def is_mount_form(arguments: Sequence[str], verbs: Container[str]) -> bool:
    """Is it `snapfs SPEC DIR [-o ...]`, as `mount -t fuse.snapfs` calls it?

    Two positionals, of which the first is no verb, and is a path or a file that is there: any
    other word is a command that was mistyped.
    """
    positionals: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "-o":
            skip = True
        elif not argument.startswith("-"):
            positionals.append(argument)
    if len(positionals) != 2 or positionals[0] in verbs:
        return False
    return "/" in positionals[0] or os.path.lexists(positionals[0])


class _HelperParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """Exit as mount(8) expects of a helper."""
        sys.exit(complain(message, HelperExit.USAGE))


def mount(arguments: Sequence[str]) -> int:
    """mount.snapfs SPEC DIR [-sfnv] [-N ns] [-o opts] [-t type]: exit statuses of mount(8)."""
    parser = _HelperParser(prog="mount.snapfs", description="Mount an image with snapfs.")
    parser.add_argument("spec")
    parser.add_argument("dir")
    parser.add_argument("-o", action="append", default=[], metavar="OPTIONS")
    parser.add_argument("-s", action="store_true", help="tolerate unknown options")
    parser.add_argument("-f", action="store_true", help="check only, do not mount")
    parser.add_argument("-n", action="store_true", help="ignored")
    parser.add_argument("-v", action="store_true", help="ignored")
    parser.add_argument("-N", metavar="NAMESPACE", help="ignored: mount(8) has entered it")
    parser.add_argument("-t", metavar="TYPE", help="ignored")
    parsed = parser.parse_intermixed_args(arguments)
    from .mounting import mount_in_background  # noqa: PLC0415 - for who mounts

    try:
        mount_in_background(parsed.spec, parsed.dir, parsed.o, dry_run=parsed.f, sloppy=parsed.s)
        return HelperExit.OK
    except (UsageError, NotPermitted) as error:
        return complain(str(error), HelperExit.USAGE)
    except SnapfsError as error:
        return complain(str(error), HelperExit.FAILURE)
    except OSError as error:
        return complain(why(error), HelperExit.SYSTEM)


def umount(arguments: Sequence[str]) -> int:
    """umount.fuse.snapfs DIR [-flnrv] [-N ns] [-t type]; returns when the daemon is gone."""
    parser = _HelperParser(prog="umount.fuse.snapfs", description="Unmount a snapfs.")
    parser.add_argument("dir")
    parser.add_argument("-f", action="store_true", help="also if the daemon does not answer")
    for letter in "nrv":
        parser.add_argument(f"-{letter}", action="store_true", help="ignored")
    parser.add_argument("-l", action="store_true", help="unmount lazily")
    parser.add_argument("-N", metavar="NAMESPACE", help="ignored: umount(8) has entered it")
    parser.add_argument("-t", metavar="TYPE", help="ignored")
    parsed = parser.parse_args(arguments)
    from .mounting import unmount  # noqa: PLC0415

    status = guarded(lambda: unmount(parsed.dir, lazy=parsed.l, force=parsed.f))
    return HelperExit.FAILURE if status else HelperExit.OK
