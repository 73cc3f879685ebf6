"""How a command ends: expected errors as one line on stderr and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from ..client.wire import RemoteError
from ..errors import ExitCode, SnapfsError
from .output import complain


def guarded(run: Callable[[], int]) -> int:
    """The exit status of `run`; an expected error is one line on stderr."""
    try:
        return run()
    except RemoteError as error:
        return complain(str(error), error.exit_status)
    except SnapfsError as error:
        return complain(str(error), error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away: nothing to tell it
        return ExitCode.ERROR
    except OSError as error:
        name = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return complain(f"{name}{error.strerror or error}", ExitCode.ERROR)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
