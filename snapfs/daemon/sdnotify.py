"""Telling systemd how the service is."""

from __future__ import annotations

import os
import socket
from collections import Counter

import trio

from ..client.documents import human
from ..engine.engine import Engine

STATUS_SECONDS = 5.0  # between two looks at what systemctl status says
RETRY_SECONDS = 0.2  # after which who does not listen is told again that the mount is there


def notify(state: str) -> bool:
    """Tell systemd, if it started us, such as READY=1 (sd_notify(3)).  Waits for nobody.

    False: it has not taken what it was told before, and is to be told again later.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return True
    if address.startswith("@"):
        address = "\0" + address[1:]
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    try:
        with socket.socket(socket.AF_UNIX, kind) as sender:
            sender.sendto(os.fsencode(state), address)
    except BlockingIOError:
        return False
    except OSError:
        pass  # it goes on without
    return True


async def tell_ready() -> None:
    """Tell systemd that the mount is there."""
    while not notify("READY=1"):
        await trio.sleep(RETRY_SECONDS)


def status_of(image: str, engine: Engine) -> str:
    """One line for systemctl status; asks no storage."""
    states = Counter(layer.state for layer in engine.snapshots)
    count = states.total()
    bad = [f"{states[state]} {state}" for state in ("incomplete", "lost") if states[state]]
    space = engine.space.status()
    parts = [
        f"serving {image}",
        f"{count} snapshot{'s' * (count != 1)}" + (f" ({', '.join(bad)})" if bad else ""),
        f"{human(space.used)} of temp space"
        + ("" if space.limit is None else f", limit {human(space.limit)}"),
    ]
    if engine.unhealthy is not None:
        parts.insert(0, f"NOT HEALTHY: {engine.unhealthy}")
    return "; ".join(parts).replace("\n", " ")


async def tell_status(image: str, engine: Engine) -> None:
    """Keep systemd informed, until cancelled; return at once if it does not ask."""
    said = ""
    while os.environ.get("NOTIFY_SOCKET"):
        text = status_of(image, engine)
        if text != said and notify(f"STATUS={text}"):
            said = text
        await trio.sleep(STATUS_SECONDS)
