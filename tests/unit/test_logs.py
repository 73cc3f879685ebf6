from __future__ import annotations

import io
import logging
import os
import threading

from snapfs.cli import logs


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
        monkeypatch.setattr(logs, "LAST_SECONDS", 60.0)
        while handler.queue.full():
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
