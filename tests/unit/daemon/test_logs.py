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


def test_a_link_that_somebody_else_has_put_there_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    state, victim = tmp_path / "state", tmp_path / "victim"
    state.mkdir(mode=0o700)
    victim.touch()
    (state / logs.LOG_NAME).symlink_to(victim)
    logs.StateLog(str(state)).handle(record("through a link"))
    (state / logs.LOG_NAME).unlink()
    os.link(victim, state / logs.LOG_NAME)
    logs.StateLog(str(state)).handle(record("by another name"))
    (state / logs.LOG_NAME).unlink()
    state.chmod(0o777)
    logs.StateLog(str(state)).handle(record("where others may put one later"))
    assert "" == victim.read_text()
    assert [] == os.listdir(state)


def test_a_log_that_has_become_long_is_kept_once(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "LOG_BYTES", 100)
    tmp_path.chmod(0o700)
    handler = logs.StateLog(str(tmp_path))
    for number in range(9):
        handler.handle(record(f"{number} {'x' * 40}"))
    handler.close()
    assert ["daemon.log", "daemon.log.1"] == sorted(os.listdir(tmp_path))
    kept = (tmp_path / "daemon.log.1").read_text() + (tmp_path / "daemon.log").read_text()
    assert ["6", "7", "8"] == kept.split()[::2]
