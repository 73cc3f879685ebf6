"""How a command ends: expected errors as one line on stderr and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from ..client.documents import document, error_values, exit_status
from ..errors import ExitCode, SnapfsError, UsageError
from .output import complain, dump

Form = Literal["document", "lines"] | None


class Misused(UsageError):
    """The arguments of a command are not what it takes; `usage` says what that is."""

    def __init__(self, message: str, usage: str = "", command: str = "") -> None:
        super().__init__(message)
        self.usage = usage
        self.command = command


def guarded(
    run: Callable[[], int], *, command: str = "", usage: str = "", form: Form = None
) -> int:
    """The exit status of `run`; an expected error is one line on stderr.

    `usage` comes before it if the arguments were wrong.  `form`: how stdout has it in JSON as
    well: as one document, or as the last of several lines.
    """
    try:
        return run()
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away: nothing to tell it
        return ExitCode.ERROR
    except (SnapfsError, OSError) as error:
        if isinstance(error, Misused):
            sys.stderr.write(error.usage or usage)
            command = error.command or command
        return _told(error, command, form)
    except KeyboardInterrupt as error:
        if form is None and not str(error):
            return ExitCode.INTERRUPTED
        return _told(error, command, form)


def _told(error: BaseException, command: str, form: Form) -> int:
    values = error_values(error)
    with suppress(BrokenPipeError):
        if form == "document":
            dump(command, {"error": values})
        elif form == "lines":
            import json  # noqa: PLC0415 - not for --help

            line = document(command, {"message_type": "error", **values})
            print(json.dumps(line), flush=True)
    return complain(str(values["message"]), exit_status(error))
