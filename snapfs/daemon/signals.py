"""What signals do to a daemon.

    SIGTERM SIGINT SIGQUIT   unmount in order
    SIGHUP                   in the foreground, whose terminal is gone: as these; else ignored
    SIGUSR1 SIGUSR2          ignored: for the progress of commands of the same name
    SIGPIPE                  ignored, as in all of Python: the call fails
    SIGTTOU                  ignored: a log on a terminal must not stop all who use the mount

What was ignored when we were started (nohup(1)) stays so, but for SIGTERM and SIGINT.
"""

from __future__ import annotations

import signal

IGNORED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTOU)
ENDING = (signal.SIGTERM, signal.SIGINT)
ENDING_UNLESS_IGNORED = (signal.SIGQUIT, signal.SIGHUP)


def prepare(*, background: bool) -> None:
    """Ignore what would end this process for nothing.  To be called as soon as it is a daemon."""
    for number in (*IGNORED, *((signal.SIGHUP,) if background else ())):
        signal.signal(number, signal.SIG_IGN)


def ending() -> tuple[signal.Signals, ...]:
    """The signals on which to unmount."""
    more = [each for each in ENDING_UNLESS_IGNORED if signal.getsignal(each) != signal.SIG_IGN]
    return (*ENDING, *more)
