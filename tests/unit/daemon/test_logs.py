from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import threading

from snapfs.daemon import logs


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("snapfs", logging.INFO, "", 0, "%s", (text,), None)


def test_a_log_that_nobody_empties_holds_up_nobody(monkeypatch):
    monkeypatch.setattr(logs, "LAST_SECONDS", 0.0)
    monkeypatch.setattr(logging, "raiseExceptions", False)
    reader, writer = os.pipe()
    with open(writer, "w") as pipe, open(reader) as lines:
        handler = logs.LaterHandler(logging.StreamHandler(pipe))
        handler.start()
        for number in range(5 * logs.MOST_WAITING):
            handler.handle(record(f"{number} {'x' * 1000}"))
        handler.flush()
        assert lines.readline().startswith("0 x")
        done = threading.Event()
        thread = threading.Thread(target=lambda: [*lines, done.set()])
        thread.start()
        monkeypatch.setattr(logs, "LAST_SECONDS", 400.0)
        while handler.queue.qsize() >= logs.MOST_WAITING:
            done.wait(0.01)
        handler.flush()
        pipe.close()
        thread.join()


def test_lines_are_written_in_order_before_and_after_the_start():
    text = io.StringIO()
    handler = logs.LaterHandler(logging.StreamHandler(text))
    handler.handle(record("first"))
    assert "first\n" == text.getvalue()
    handler.start()
    for number in range(100):
        handler.handle(record(str(number)))
    handler.flush()
    assert ["first", *map(str, range(100))] == text.getvalue().split()


INTERRUPTED = """
import logging, signal
from snapfs.daemon import logs

logging.raiseExceptions = False
log = logging.getLogger("snapfs")
log.propagate = False
log.addHandler(logs.LaterHandler(logging.NullHandler()))
log.handlers[0].start()
def interrupt(*_):
    log.warning("from a signal")
    signal.setitimer(signal.ITIMER_REAL, 0.0001)  # not before: there must be time for a line
signal.signal(signal.SIGALRM, interrupt)
interrupt()
for number in range(20000):
    log.warning("line %d", number)
signal.signal(signal.SIGALRM, signal.SIG_IGN)
"""


def test_a_signal_that_comes_in_the_midst_of_a_line_can_log():
    """As the one that ends a daemon whose storage does not answer."""
    subprocess.run([sys.executable, "-c", INTERRUPTED], check=True, timeout=400)
