"""Reports the state of the service to systemd, like ``sd_notify(3)``."""

from __future__ import annotations

import logging
import os
import socket

__all__ = ["notify"]

_log = logging.getLogger(__name__)


def notify(state: str) -> None:
    """Send a state such as ``READY=1`` to the service manager; nothing where none listens.

    The protocol is one datagram to the socket that ``$NOTIFY_SOCKET`` names; a leading ``@`` stands
    for the NUL of an abstract address. A manager that can't be told is logged, not an error: the
    server itself is fine.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.connect(address)
            sender.sendall(state.encode())
    except OSError as error:
        _log.warning("can't notify the service manager of %s: %s", state, error.strerror or error)
