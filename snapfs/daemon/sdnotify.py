"""Telling systemd how the service is."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """Tell systemd, if it started us, such as READY=1 (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto(os.fsencode(state), address)
    except OSError:
        pass  # it goes on without
